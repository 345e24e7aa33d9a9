"""`python -m benchmarks.occlusion [FOLDER]`: what `occluded` of `direction=both` is worth.

The shipped weights on generated scenes, whose true occlusion is known, and on a folder of pairs
with true flow (`training.pairs`; `occlusions.png` beside a pair, where there is one, is white where
it is occluded).
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image
from safetensors import safe_open

from benchmarks.engines import run_eager
from benchmarks.report import table
from benchmarks.samples import SAMPLES
from export.networks import NETWORKS
from export.shipped import WEIGHTS
from export.weights import load_weights
from flownet2 import measures
from training.generator import render
from training.pairs import Pair, read_pairs
from training.textures import Textures

SEED, SCENES, HEIGHT, WIDTH = 20_261_125, 24, 384, 512


@dataclass(frozen=True)
class Case:
    """A pair, and where its first image shows what the second does not, if that is known."""

    pair: Pair
    occluded: npt.NDArray[np.bool_] | None


def generated() -> Iterator[Case]:
    """Scenes that no training has seen: their seeds are none of its own."""
    textures = Textures()
    for index in range(SCENES):
        scene = render(SEED + index, 1, HEIGHT, WIDTH, textures, effects=False)
        first, second = scene.frames[:, 0].permute(0, 2, 3, 1).numpy()
        flow = scene.flow[0].permute(1, 2, 0).numpy()
        valid = np.ones((HEIGHT, WIDTH), np.bool_)
        yield Case(Pair("generated", (first, second), flow, valid), scene.occluded[0].numpy())


def read(folder: Path) -> Iterator[Case]:
    """The pairs of a folder."""
    for pair in read_pairs(folder):
        file = folder / pair.name / "occlusions.png"
        yield Case(pair, np.asarray(Image.open(file).convert("L")) > 127 if file.exists() else None)


def rows(cases: Iterator[Case]) -> Iterator[tuple[str, ...]]:
    """One row for each family: share of pixels called occluded, precision, recall, errors."""
    with safe_open(WEIGHTS, framework="np") as file:
        network = NETWORKS[file.metadata()["network"]]
    model, _ = load_weights(network, WEIGHTS)
    for family, members in groupby(cases, key=lambda case: case.pair.family):
        called, right, true, all_errors, visible_errors = [], 0, 0, [], []
        counted = 0
        for case in members:
            pair = case.pair
            batch = np.stack(pair.frames)
            forward, backward = run_eager(model, batch, batch[::-1].copy())
            occluded = measures.occluded(forward, backward)
            error = measures.end_point_error(forward, pair.flow)
            all_errors.append(error[pair.valid].mean())
            visible_errors.append(error[pair.valid & ~occluded].mean())
            called.append(occluded.mean())
            if case.occluded is not None:
                right += int((occluded & case.occluded & pair.valid).sum())
                counted += int((occluded & pair.valid).sum())
                true += int((case.occluded & pair.valid).sum())
        yield (
            f"{family}, {len(called)}",
            f"{np.mean(called):.1%}",
            f"{right / counted:.2f}" if counted else "",
            f"{right / true:.2f}" if true else "",
            f"{np.mean(all_errors):.2f}",
            f"{np.mean(visible_errors):.2f}",
        )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.occlusion", description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path, default=SAMPLES)
    folder = parser.parse_args().folder
    head = ("pairs", "called occluded", "precision", "recall", "EPE, all", "EPE, visible")
    print(table(head, [*rows(generated()), *rows(read(folder))]))


if __name__ == "__main__":
    main()

"""`python -m benchmarks.occlusion [FOLDER]`: precision and recall of the occlusion mask.

Measures the shipped weights on generated scenes, whose occlusion is known, and on a folder of pairs
with ground truth (`training.pairs`; if a pair has an `occlusions.png`, it is white where pixels are
occluded). The errors without the flagged pixels show how reliable the other pixels are.
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
    """A pair, and its true occlusion mask if it is known."""

    pair: Pair
    occluded: npt.NDArray[np.bool_] | None


def generated() -> Iterator[Case]:
    """Yield generated scenes from seeds that are not used in training."""
    textures = Textures()
    for index in range(SCENES):
        scene = render(SEED + index, 1, HEIGHT, WIDTH, textures, effects=False)
        first, second = scene.frames[:, 0].permute(0, 2, 3, 1).numpy()
        flow = scene.flow[0].permute(1, 2, 0).numpy()
        valid = np.ones((HEIGHT, WIDTH), np.bool_)
        yield Case(Pair("generated", (first, second), flow, valid), scene.occluded[0].numpy())


def read(folder: Path) -> Iterator[Case]:
    """Yield the pairs of a folder."""
    for pair in read_pairs(folder):
        file = folder / pair.name / "occlusions.png"
        yield Case(pair, np.asarray(Image.open(file).convert("L")) > 127 if file.exists() else None)


def rows(cases: Iterator[Case]) -> Iterator[tuple[str, ...]]:
    """Yield a row for each family: share of flagged pixels, precision, recall, errors."""
    with safe_open(WEIGHTS, framework="np") as file:
        network = NETWORKS[file.metadata()["network"]]
    model, _ = load_weights(network, WEIGHTS)
    for family, members in groupby(cases, key=lambda case: case.pair.family):
        flagged, correct, true, all_errors, visible_errors = [], 0, 0, [], []
        counted = 0
        for case in members:
            pair = case.pair
            batch = np.stack(pair.frames)
            forward, backward = run_eager(model, batch, batch[::-1].copy())
            occluded = measures.occluded(forward, backward)
            error = measures.end_point_error(forward, pair.flow)
            all_errors.append(error[pair.valid].mean())
            visible_errors.append(error[pair.valid & ~occluded].mean())
            flagged.append(occluded.mean())
            if case.occluded is not None:
                correct += int((occluded & case.occluded & pair.valid).sum())
                counted += int((occluded & pair.valid).sum())
                true += int((case.occluded & pair.valid).sum())
        yield (
            f"{family}, {len(flagged)}",
            f"{np.mean(flagged):.1%}",
            f"{correct / counted:.2f}" if counted else "",
            f"{correct / true:.2f}" if true else "",
            f"{np.mean(all_errors):.2f}",
            f"{np.mean(visible_errors):.2f}",
        )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.occlusion", description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path, default=SAMPLES)
    folder = parser.parse_args().folder
    head = ("pairs", "flagged", "precision", "recall", "EPE, all", "EPE, visible")
    print(table(head, [*rows(generated()), *rows(read(folder))]))


if __name__ == "__main__":
    main()

"""Measure exported networks and OpenCV's methods on image pairs with true flow.

    python -m training.evaluate --pairs DIR [--model model.onnx …] [--pictures DIR]

prints a table with the end-point error of each pair, each family and all pairs. If occlusions are
known, it has rows for visible and occluded pixels, and for visible pixels by length of motion. The
last rows are the share of pixels off by more than 3 pixels, and the milliseconds per pair.
`--pictures` writes first frame, ground truth and the flow of every method side by side in
Middlebury's colours.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import onnxruntime
from PIL import Image

from flownet2.colours import colours
from flownet2.contract import FLOW_OUTPUT, IMAGE_INPUTS
from flownet2.evaluate import Errors
from flownet2.formats import Flow
from training.pairs import Pair, read_pairs

Image8 = npt.NDArray[np.uint8]
Method = Callable[[Image8, Image8], Flow]

SPEEDS = (2.0, 10.0, 40.0)
"""Lengths of true motion, in pixels, between the rows of visible pixels."""
opencv: Any = cv2  # its type stubs lack half of the functions used here


@dataclass(frozen=True)
class Score:
    """Errors of one method on one pair.

    Attributes:
        errors: over all pixels with ground truth.
        visible: over the pixels that are visible in both frames, if occlusions are known.
        milliseconds: time of the method.
    """

    errors: Errors
    visible: Errors | None
    milliseconds: float

    @property
    def epe(self) -> float:
        """Mean end-point error, in pixels."""
        return self.errors.mean() or 0.0


# Rows of the table if occlusions are known: title, True for visible pixels only, and group.
_ROWS = (
    ("visible", True, "all"),
    ("occluded", False, "occluded"),
    ("visible, 0 to 2 px", True, "0-2"),
    ("visible, 2 to 10 px", True, "2-10"),
    ("visible, 10 to 40 px", True, "10-40"),
)


def score(flow: Flow, pair: Pair, milliseconds: float = 0.0) -> Score:
    """Compare a flow [H, W, 2] with the true one over the valid pixels."""
    truth = np.where(pair.valid[..., None], pair.flow, np.float32(np.nan))
    errors, visible = Errors(), None
    errors.add(flow, truth, pair.occluded)
    if pair.occluded is not None:
        visible = Errors(SPEEDS)
        visible.add(flow, np.where(pair.occluded[..., None], np.float32(np.nan), truth))
    return Score(errors, visible, milliseconds)


def _gray(method: Method) -> Method:
    """Return a method for RGB images that converts them to grey first."""

    def on_colour(first: Image8, second: Image8) -> Flow:
        return method(
            opencv.cvtColor(first, opencv.COLOR_RGB2GRAY),
            opencv.cvtColor(second, opencv.COLOR_RGB2GRAY),
        )

    return on_colour


def opencv_methods() -> dict[str, Method]:
    """Return OpenCV's classical methods by name."""
    fast = opencv.DISOpticalFlow_create(opencv.DISOPTICAL_FLOW_PRESET_FAST)
    medium = opencv.DISOpticalFlow_create(opencv.DISOPTICAL_FLOW_PRESET_MEDIUM)
    deep = opencv.optflow.createOptFlow_DeepFlow()
    return {
        "zero flow": lambda first, second: np.zeros((*first.shape[:2], 2), np.float32),
        "Farneback": _gray(
            lambda first, second: opencv.calcOpticalFlowFarneback(
                first, second, None, 0.5, 5, 15, 5, 7, 1.5, 0
            )
        ),
        "DIS fast": _gray(lambda first, second: fast.calc(first, second, None)),
        "DIS medium": _gray(lambda first, second: medium.calc(first, second, None)),
        "DeepFlow": _gray(lambda first, second: deep.calc(first, second, None)),
    }


def onnx_method(path: Path) -> Method:
    """Load an exported network (two uint8 [N, H, W, 3] to float32 [N, H, W, 2])."""
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def run(first: Image8, second: Image8) -> Flow:
        flow: Flow = session.run(
            [FLOW_OUTPUT], dict(zip(IMAGE_INPUTS, (first[None], second[None]), strict=True))
        )[0][0]
        return flow

    return run


def evaluate(pairs: list[Pair], methods: dict[str, Method]) -> dict[str, dict[str, Score]]:
    """Return the scores by method and pair. Each method first runs once without being timed."""
    scores: dict[str, dict[str, Score]] = {}
    for name, method in methods.items():
        method(*pairs[0].frames)
        scores[name] = {}
        for pair in pairs:
            started = time.perf_counter()
            flow = method(*pair.frames)
            milliseconds = 1000 * (time.perf_counter() - started)
            scores[name][pair.name] = score(flow, pair, milliseconds)
    return scores


def table(pairs: list[Pair], scores: dict[str, dict[str, Score]]) -> str:
    """Return a Markdown table of the scores."""
    lines = ["| end-point error | " + " | ".join(scores) + " |", "|---" * (len(scores) + 1) + "|"]

    def row(title: str, cell: Callable[[dict[str, Score]], str]) -> None:
        cells = " | ".join(cell(by_pair) for by_pair in scores.values())
        lines.append(f"| {title} | {cells} |")

    def mean_error(names: list[str]) -> Callable[[dict[str, Score]], str]:
        return lambda by_pair: f"{np.mean([by_pair[name].epe for name in names]):.2f}"

    for pair in pairs:
        row(pair.name, mean_error([pair.name]))

    def pooled(names: list[str], visible: bool, group: str) -> Callable[[dict[str, Score]], str]:
        def cell(by_pair: dict[str, Score]) -> str:
            total = Errors()
            for name in names:
                errors = by_pair[name].visible if visible else by_pair[name].errors
                if errors is not None:
                    total.merge(errors)
            mean = total.mean(group)
            return "" if mean is None else f"{mean:.2f}"

        return cell

    for family in dict.fromkeys(pair.family for pair in pairs):
        members = [pair for pair in pairs if pair.family == family]
        names = [pair.name for pair in members]
        if len(members) > 1:
            row(f"**{family}, mean of {len(members)}**", mean_error(names))
        if all(pair.occluded is not None for pair in members):
            for title, visible, group in _ROWS:
                row(f"{family}, {title}", pooled(names, visible, group))
    row(f"**all, mean of {len(pairs)}**", mean_error([pair.name for pair in pairs]))

    def beyond(by_pair: dict[str, Score]) -> str:
        shares = [score.errors.share_beyond(3) or 0.0 for score in by_pair.values()]
        return f"{100 * np.mean(shares):.1f}"

    row("pixels off by more than 3, %", beyond)
    row(
        "milliseconds a pair",
        lambda by_pair: f"{np.mean([score.milliseconds for score in by_pair.values()]):.0f}",
    )
    return "\n".join(lines)


def picture(pair: Pair, methods: dict[str, Method]) -> Image8:
    """Draw the first frame, the true flow and each method's flow in a row, on one colour scale."""
    longest = float(np.hypot(*np.moveaxis(pair.flow, 2, 0))[pair.valid].max())
    truth = colours(pair.flow, longest)
    truth[~pair.valid] = 0
    panels = [pair.frames[0], truth]
    panels += [colours(method(*pair.frames), longest) for method in methods.values()]
    return np.concatenate(panels, axis=1)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m training.evaluate", description=__doc__)
    parser.add_argument(
        "--pairs", type=Path, required=True, help="folder with a folder for each pair"
    )
    parser.add_argument(
        "--model", type=Path, action="append", default=[], help="exported model.onnx; repeatable"
    )
    parser.add_argument("--pictures", type=Path, help="folder for pictures of all flows")
    arguments = parser.parse_args()
    pairs = list(read_pairs(arguments.pairs))
    methods = opencv_methods()
    for path in arguments.model:
        # The path of an exported model is <name>/1/model.onnx.
        name = path.parent.parent.name if path.stem == "model" else path.stem
        methods[name or path.stem] = onnx_method(path)
    print(table(pairs, evaluate(pairs, methods)))
    if arguments.pictures:
        arguments.pictures.mkdir(parents=True, exist_ok=True)
        shown = {name: method for name, method in methods.items() if name != "zero flow"}
        for pair in pairs:
            path = arguments.pictures / f"{pair.name}.png"
            Image.fromarray(picture(pair, shown)).save(path)


if __name__ == "__main__":
    main()

"""Errors of the shipped weights on the samples: as served and in half precision; errors of OpenCV.

ONNX Runtime emulates the GPU's arithmetic on the CPU: every tensor of a block is rounded to
float16, and sums are float32, as on tensor cores.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, median

import cv2
import matplotlib.pyplot as plt
import numpy as np
from tritonclient import grpc

from benchmarks.engines import infer, onnx_runtime, run_eager
from benchmarks.report import milliseconds, table
from benchmarks.samples import SAMPLES
from export.networks import NETWORKS
from export.served.machine import available_cores
from export.shipped import WEIGHTS
from export.weights import load_weights
from launch.triton import Address
from training.evaluate import Method, opencv_methods, score
from training.pairs import Pair, read_pairs

OPENCV_METHODS = ("DIS medium", "DeepFlow")
ROUNDS = 5


@dataclass(frozen=True)
class Result:
    """Mean end-point error in pixels, and mean over the pairs of the median seconds."""

    name: str
    error: float
    seconds: float


def precision(address: Address, network: str, half_model: Path) -> str:
    """Return a Markdown table of the end-point errors of each sample in each precision.

    Args:
        address: a Triton that serves the shipped weights as ``flownet2``.
        network: name of their network.
        half_model: the half-precision ONNX file, which GPUs run.
    """
    model, _ = load_weights(NETWORKS[network], WEIGHTS)
    half = onnx_runtime(half_model)
    names, rows = [], []
    with grpc.InferenceServerClient(address.grpc) as client:
        for pair in read_pairs(SAMPLES):
            image1, image2 = (np.array(frame)[None] for frame in pair.frames)
            exact = run_eager(model, image1, image2)[0]
            others = infer(client, image1, image2)[0], half(image1, image2)[0]
            names.append(pair.name)
            rows.append(
                (
                    *(score(flow, pair).epe for flow in (exact, *others)),
                    *(score(flow, replace(pair, flow=exact)).epe for flow in others),
                )
            )
    rows.append(tuple(np.mean(rows, axis=0)))
    return table(
        ("sample", "EPE fp32", "EPE served", "EPE fp16", "served to fp32", "fp16 to fp32"),
        [
            (name, *(f"{value:.4f}" for value in row))
            for name, row in zip([*names, "mean"], rows, strict=True)
        ],
    )


def beside_opencv(address: Address, network: str) -> list[Result]:
    """Measure the served network and OpenCV's methods on the samples, in alternating calls."""
    cv2.setNumThreads(available_cores())
    pairs = list(read_pairs(SAMPLES))
    known = opencv_methods()
    with grpc.InferenceServerClient(address.grpc) as client:
        methods: dict[str, Method] = {
            f"{network} as served": lambda a, b: infer(client, a[None], b[None])[0],
            **{name: known[name] for name in OPENCV_METHODS},
        }
        scores = [_measure(methods, pair) for pair in pairs]
    return [
        Result(name, *(fmean(each[name][part] for each in scores) for part in (0, 1)))
        for name in methods
    ]


def _measure(methods: dict[str, Method], pair: Pair) -> dict[str, tuple[float, float]]:
    """Return error and median seconds of each method."""
    errors: dict[str, float] = {}
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    for turn in range(ROUNDS + 1):
        for name, method in methods.items():
            start = time.perf_counter()
            flow = method(*pair.frames)
            if turn:  # the first call plans and allocates
                seconds[name].append(time.perf_counter() - start)
            else:
                errors[name] = score(flow, pair).epe
    return {name: (errors[name], median(seconds[name])) for name in methods}


def results_table(results: list[Result]) -> str:
    """Return a Markdown table of errors and times with the best values bold."""

    def column(values: list[float], text: Callable[[float], str]) -> list[str]:
        return [f"**{text(v)}**" if v == min(values) else text(v) for v in values]

    errors = column([result.error for result in results], lambda value: f"{value:.2f}")
    times = column([result.seconds for result in results], milliseconds)
    names = [result.name for result in results]
    return table(
        ("samples, mean", "EPE px", "ms per pair"), list(zip(names, errors, times, strict=True))
    )


def draw(results: list[Result], file: Path) -> None:
    """Draw error against time as a small PNG."""
    figure, axes = plt.subplots(figsize=(4.2, 2.8), dpi=110)
    for result in results:
        axes.scatter(result.seconds * 1e3, result.error)
        axes.annotate(
            result.name, (result.seconds * 1e3, result.error), (0, 7),
            textcoords="offset points", ha="center",
        )  # fmt: skip
    axes.set_xscale("log")
    axes.margins(0.25, 0.3)
    axes.set_xlabel("milliseconds per pair (CPU)")
    axes.set_ylabel("end-point error (pixels)")
    axes.grid(alpha=0.3)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.savefig(file, bbox_inches="tight")
    plt.close(figure)

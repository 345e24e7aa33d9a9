"""What serving costs in accuracy: the shipped weights in PyTorch fp32, through Triton, and in fp16.

ONNX Runtime emulates on the CPU what GPUs run: every tensor of a block is rounded to float16, and
sums are float32, as on tensor cores.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
from tritonclient import grpc

from benchmarks.engines import infer, onnx_runtime, run_eager
from benchmarks.report import table
from benchmarks.samples import SAMPLES
from export.networks import NETWORKS
from export.shipped import WEIGHTS
from export.weights import load_weights
from launch.triton import Address
from training.evaluate import score
from training.pairs import read_pairs


def compare(address: Address, network: str, half_model: Path) -> str:
    """End-point errors of the samples; a Markdown table.

    Args:
        address: a Triton that serves the shipped weights as ``flownet2``.
        network: which network they are of.
        half_model: the file that GPUs run.
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
            (name, *(f"{value:.3f}" for value in row))
            for name, row in zip([*names, "**mean**"], rows, strict=True)
        ],
    )

"""What serving costs in accuracy: the shipped weights in PyTorch fp32 and through Triton."""

from dataclasses import replace

import numpy as np
from tritonclient import grpc

from benchmarks.engines import infer, run_eager
from benchmarks.report import table
from benchmarks.samples import SAMPLES
from export.networks import NETWORKS
from export.shipped import WEIGHTS
from export.weights import load_weights
from launch.triton import Address
from training.evaluate import score
from training.pairs import read_pairs


def compare(address: Address, network: str) -> str:
    """End-point errors of the samples; a Markdown table.

    Args:
        address: a Triton that serves the shipped weights as ``flownet2``.
        network: which network they are of.
    """
    model, _ = load_weights(NETWORKS[network], WEIGHTS)
    names, rows = [], []
    with grpc.InferenceServerClient(address.grpc) as client:
        for pair in read_pairs(SAMPLES):
            image1, image2 = (np.array(frame)[None] for frame in pair.frames)
            exact = run_eager(model, image1, image2)[0]
            served = infer(client, image1, image2)[0]
            names.append(pair.name)
            rows.append(
                (
                    score(exact, pair).epe,
                    score(served, pair).epe,
                    score(served, replace(pair, flow=exact)).epe,
                )
            )
    rows.append(tuple(np.mean(rows, axis=0)))
    return table(
        ("sample", "EPE fp32", "EPE served", "served against fp32"),
        [
            (name, *(f"{value:.3f}" for value in row))
            for name, row in zip([*names, "**mean**"], rows, strict=True)
        ],
    )

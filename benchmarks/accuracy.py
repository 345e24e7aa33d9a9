"""What serving costs in accuracy: the shipped weights in PyTorch fp32 and through Triton."""

from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image
from tritonclient import grpc

from benchmarks.engines import infer, run_eager
from benchmarks.report import table
from export.networks import NETWORKS
from export.weights import load_weights
from launch.triton import Address

PROJECT = Path(__file__).parent.parent
WEIGHTS = PROJECT / "weights" / "flownet2.safetensors"
SAMPLES = PROJECT / "samples"

Images = npt.NDArray[np.uint8]


def compare(address: Address, network: str) -> str:
    """End-point errors of the samples; a Markdown table.

    Args:
        address: a Triton that serves the shipped weights as ``flownet2``.
        network: which network they are of.
    """
    model, _ = load_weights(NETWORKS[network], WEIGHTS)
    rows = []
    with grpc.InferenceServerClient(address.grpc) as client:
        for folder in sample_folders():
            image1, image2 = frames(folder)
            exact = run_eager(model.eval(), image1, image2)[0]
            served = infer(client, image1, image2)[0]
            truth = read_flo(folder / "gt.flo")
            rows.append([error(exact, truth), error(served, truth), error(served, exact)])
    names = [folder.name for folder in sample_folders()]
    rows.append([float(column) for column in np.mean(rows, axis=0)])
    return table(
        ("sample", "EPE fp32", "EPE served", "served against fp32"),
        [
            (name, *(f"{value:.3f}" for value in row))
            for name, row in zip([*names, "**mean**"], rows, strict=True)
        ],
    )


def sample_folders() -> list[Path]:
    """Folders of the pairs that ship."""
    return sorted(file.parent for file in SAMPLES.glob("*/frame0.png"))


def frames(folder: Path) -> tuple[Images, Images]:
    """The two images of a sample, each ``[1, H, W, 3]``."""
    first, second = (
        np.array(Image.open(folder / f"frame{index}.png").convert("RGB"))[None] for index in (0, 1)
    )
    return first, second


def read_flo(file: Path) -> npt.NDArray[np.float32]:
    """A Middlebury ``.flo`` file: magic number, width, height, then u and v by pixel."""
    width, height = np.fromfile(file, "<i4", count=2, offset=4)
    flow: npt.NDArray[np.float32] = np.fromfile(file, "<f4", offset=12).reshape(height, width, 2)
    return flow


def error(flow: npt.NDArray[np.float32], other: npt.NDArray[np.float32]) -> float:
    """Mean end-point error in pixels, where both are known (unknown: beyond 1e9 or NaN)."""
    distance = np.linalg.norm(flow - other, axis=-1)
    return float(distance[np.abs(distance) < 1e9].mean())

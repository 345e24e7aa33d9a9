"""The networks against an independent executor of the Caffe nets, through ``.caffemodel.h5``."""

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from export.networks import NETWORKS, FlowNet2
from export.weights import load_weights
from tests.support.caffe_reference import make_blobs, run, write_h5

NETS = {
    "FlowNet2-S": (["s"], 1),
    "FlowNet2-s": (["s"], 3 / 8),
    "FlowNet2-C": (["c"], 1),
    "FlowNet2-c": (["c"], 3 / 8),
    "FlowNet2-ss": (["s-thin", "s"], 3 / 8),
    "FlowNet2-sss": (["s-thin", "s", "s"], 3 / 8),
    "FlowNet2-cs": (["c", "s"], 3 / 8),
    "FlowNet2-css": (["c", "s", "s"], 3 / 8),
    "FlowNet2-css-ft-sd": (["c", "s", "s"], 3 / 8),
    "FlowNet2-SD": (["sd"], 1),
    "FlowNet2": (["c", "s", "s", "sd", "fusion"], 1),
}
SIZES = [(75, 100), (388, 584), (436, 1024), (375, 1242), (376, 452)]


def images(height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Return a texture, and the same texture moved by three pixels."""
    rng = np.random.default_rng(1)
    noise = gaussian_filter(rng.random((1, height + 3, width + 3, 3)), (0, 2, 2, 0))
    noise = ((noise - noise.min()) / (noise.max() - noise.min()) * 255).astype(np.uint8)
    return noise[:, 3:, 3:], noise[:, :-3, :-3]


def test_flownet2_has_the_papers_parameters() -> None:
    with torch.device("meta"):
        model = FlowNet2(NETWORKS["FlowNet2"])
    assert sum(p.numel() for p in model.parameters()) == 162_518_850


def follows_caffe(name: str, sizes: list[tuple[int, int]], folder: Path) -> None:
    """Compare a network with random weights with the reference, and print the distance in pixels.

    Single pixels may differ where a warp reads from just at the border of an image: rounding
    decides there between a pixel and zero.
    """
    nets, width = NETS[name]
    blobs = make_blobs(nets, width)
    model, _ = load_weights(NETWORKS[name], write_h5(folder / "net.caffemodel.h5", blobs))
    for size in sizes:
        first, second = images(*size)
        with torch.inference_mode():
            flow = model(torch.from_numpy(first), torch.from_numpy(second)).numpy()
        expected = run(nets, blobs, first, second)
        error = np.linalg.norm(flow - expected, axis=-1)
        print(
            f"{name} {size[0]}x{size[1]}: {error.mean():.1e} px, {error.max():.1e} at most, "
            f"of {np.abs(expected).mean():.1e} px"
        )
        pixel = min(1.0, np.abs(expected).max())  # SD's flows are small
        assert pixel > 1e-3
        assert error.mean() < 1e-4 * pixel
        assert np.quantile(error, 0.999) < 1e-3 * pixel


@pytest.mark.parametrize("name", NETS)
def test_network_follows_the_caffe_nets(name: str, tmp_path: Path) -> None:
    follows_caffe(name, SIZES[: len(SIZES) if name == "FlowNet2-cs" else 1], tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("name", NETS)
def test_network_follows_the_caffe_nets_at_every_size(name: str, tmp_path: Path) -> None:
    follows_caffe(name, SIZES[1:], tmp_path)

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


def images(n: int, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(1)
    noise = gaussian_filter(rng.random((2, n, height, width, 3)), (0, 0, 2, 2, 0))
    noise = (noise - noise.min()) / (noise.max() - noise.min())
    first, second = (noise * 255).astype(np.uint8)
    return first, second


def test_the_release_has_seventeen_networks() -> None:
    assert len(NETWORKS) == 17


def test_flownet2_has_the_papers_parameters() -> None:
    with torch.device("meta"):
        model = FlowNet2(NETWORKS["FlowNet2"])
    assert sum(p.numel() for p in model.parameters()) == 162_518_850


@pytest.mark.parametrize("name", NETS)
def test_network_follows_the_caffe_nets(name: str, tmp_path: Path) -> None:
    nets, width = NETS[name]
    blobs = make_blobs(nets, width)
    path = write_h5(tmp_path / "net.caffemodel.h5", blobs)
    model, _ = load_weights(NETWORKS[name], path)
    first, second = images(2, 70, 64)
    with torch.no_grad():
        flow = model(torch.from_numpy(first), torch.from_numpy(second)).numpy()
    expected = run(nets, blobs, first, second)
    assert flow.shape == (2, 70, 64, 2)
    assert np.abs(expected).mean() > 1e-3
    np.testing.assert_allclose(flow, expected, rtol=0, atol=1e-3 * np.abs(expected).max())

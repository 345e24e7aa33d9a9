"""Datasets in training: augmented crops against their frames, shares, masks, held-out pairs."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from flownet2.formats import write_flow
from training.data import augment, read_sources
from training.loss import endpoint_error, multiscale_loss
from training.pairs import Pair, read_pairs
from training.pool import Crop

ROOT = Path(__file__).parents[2]


def smooth_pair(shift: tuple[int, int]) -> Pair:
    """A smooth picture that moves by whole pixels."""
    coarse = torch.rand(1, 3, 20, 28, generator=torch.Generator().manual_seed(0)) * 255
    fine = F.interpolate(coarse, (200, 280), mode="bicubic").clamp(0, 255)[0].permute(1, 2, 0)
    scene = fine.round().to(torch.uint8).numpy()
    u, v = shift
    first = scene[20:180, 20:260]
    second = scene[20 - v : 180 - v, 20 - u : 260 - u]
    flow = np.broadcast_to(np.array(shift, np.float32), (160, 240, 2)).copy()
    return Pair("a", (first, second), flow, np.ones((160, 240), bool))


def warp_error(crop: Crop) -> torch.Tensor:
    """Difference between the first frame and the second one sampled along the flow."""
    height, width = crop.valid.shape
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    grid = torch.stack(
        [(x + crop.flow[0] + 0.5) / width * 2 - 1, (y + crop.flow[1] + 0.5) / height * 2 - 1], -1
    )
    second = F.grid_sample(crop.frames[1][None].float(), grid[None], align_corners=False)[0]
    inside = (grid.abs() < 0.95).all(-1) & crop.valid
    return (second - crop.frames[0].float()).abs().amax(0)[inside]


def test_the_flow_of_an_augmented_crop_is_that_of_its_frames() -> None:
    random = torch.Generator().manual_seed(1)
    pair = smooth_pair((7, -5))
    flows = []
    for _ in range(8):
        crop = augment(pair, (96, 128), random)
        error = warp_error(crop)
        assert len(error) > 3000
        assert error.median() < 2
        assert error.quantile(0.9) < 5
        wrong = Crop(crop.frames, crop.flow + 2, crop.occluded, crop.valid)
        assert warp_error(wrong).median() > 2 * error.median()
        flows.append(crop.flow.mean(dim=(1, 2)))
    assert len({tuple(flow.tolist()) for flow in flows}) == 8


def test_pixels_without_truth_do_not_count() -> None:
    pair = smooth_pair((3, 4))
    pair.valid[:, ::2] = False
    pair.flow[~pair.valid] = 0
    crop = augment(pair, (96, 128), torch.Generator().manual_seed(2))
    assert 0.4 < crop.valid.float().mean() < 0.6
    assert (crop.flow[:, ~crop.valid] == 0).all()
    flow = torch.tensor([3.0, 4.0]).view(1, 2, 1, 1).expand(1, 2, 64, 64) * crop.valid[:64, :64]
    valid = crop.valid[None, :64, :64]
    zero = torch.zeros(1, 2, 16, 16)
    assert endpoint_error(zero, flow, valid) == pytest.approx(5, rel=1e-4)
    assert multiscale_loss([zero], flow, valid, 1.0, [1.0]) == pytest.approx(5, rel=1e-4)
    none = torch.zeros_like(valid)
    assert endpoint_error(zero, flow * 0, none) == 0


def write_pairs(folder: Path, names: list[str]) -> None:
    for name in names:
        (folder / name).mkdir(parents=True)
        for frame in ("frame0.png", "frame1.png"):
            Image.new("RGB", (64, 64)).save(folder / name / frame)
        write_flow(folder / name / "gt.flo", np.zeros((64, 64, 2), np.float32))


def test_sequences_are_held_out_whole_and_shares_add_up(tmp_path: Path) -> None:
    write_pairs(tmp_path / "mine", [f"pair_{number}" for number in range(10)])
    (source,) = read_sources([("pairs", str(tmp_path / "mine"))], 0.2)
    assert source.share == 1
    held = {sample.sequence for sample in source.held_out}
    assert len(held) == 2
    assert held.isdisjoint(sample.sequence for sample in source.training)
    assert len(source.training) == 8
    shared = [("pairs", f"{tmp_path / 'mine'}:0.25"), ("pairs", str(tmp_path / "mine"))]
    assert [source.share for source in read_sources(shared, 0.2)] == [0.25, 0.75]
    with pytest.raises(ValueError, match="more than 1"):
        read_sources([("pairs", f"{tmp_path / 'mine'}:0.7")] * 2, 0.2)


def test_samples_of_the_project_are_read_as_pairs() -> None:
    families = Counter(pair.family for pair in read_pairs(ROOT / "samples"))
    assert families == {"layers": 3, "photo": 1}

"""The generator against what its images show: flow, occlusion and seeds."""

from concurrent.futures import ProcessPoolExecutor
from copy import copy
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from training import generator
from training.generator import Mixture, Scenes, render
from training.prefetch import draw_ahead
from training.textures import Textures

HEIGHT, WIDTH = 96, 128


@pytest.fixture(scope="module")
def smooth(textures: Textures) -> Textures:
    """Procedural textures without sharp detail, so that interpolation errs little."""
    textures = copy(textures)
    coarse = F.interpolate(textures.procedural.float(), size=(40, 40), mode="area")
    fine = F.interpolate(coarse, size=textures.procedural.shape[2:], mode="bicubic")
    textures.procedural = fine.clamp(0, 255).to(torch.uint8)
    return textures


def warp_back(scenes: Scenes) -> torch.Tensor:
    """Frame 1 sampled where the flow says that each pixel of frame 0 went."""
    y, x = torch.meshgrid(torch.arange(HEIGHT), torch.arange(WIDTH), indexing="ij")
    grid = torch.stack(
        [
            (x + scenes.flow[:, 0] + 0.5) / WIDTH * 2 - 1,
            (y + scenes.flow[:, 1] + 0.5) / HEIGHT * 2 - 1,
        ],
        -1,
    )
    return F.grid_sample(scenes.frames[1].float(), grid, align_corners=False)


def away_from_edges(mask: torch.Tensor) -> torch.Tensor:
    """The mask without a border of two pixels, where layers are blended."""
    blocked = F.max_pool2d((~mask).float()[:, None], 5, stride=1, padding=2)[:, 0]
    return blocked == 0


@pytest.mark.parametrize(("driving", "bound"), [(False, 1.5), (True, 2.5)])
def test_frame_1_warped_back_is_frame_0_where_nothing_hides_it(
    smooth: Textures, driving: bool, bound: float
) -> None:
    scenes = render(5, 4, HEIGHT, WIDTH, smooth, driving=driving, effects=False)
    error = (warp_back(scenes) - scenes.frames[0].float()).abs().amax(dim=1)
    visible = away_from_edges(~scenes.occluded)
    assert visible.float().mean() > 0.5
    # Two roundings to uint8 and one bilinear interpolation of a smooth texture.
    # (Small stamps keep their detail, and distant ground is sampled sparsely: hence the tail.)
    assert error[visible].mean() < bound
    assert error[visible].quantile(0.95) < 5 * bound


def test_a_flow_that_is_off_by_half_a_pixel_is_noticed(smooth: Textures) -> None:
    scenes = render(5, 4, HEIGHT, WIDTH, smooth, effects=False)
    shifted = Scenes(scenes.frames, scenes.flow + 0.5, scenes.occluded)
    visible = away_from_edges(~scenes.occluded)
    right = (warp_back(scenes) - scenes.frames[0].float()).abs().amax(dim=1)[visible].mean()
    wrong = (warp_back(shifted) - scenes.frames[0].float()).abs().amax(dim=1)[visible].mean()
    assert wrong > 2 * right


def test_what_leaves_the_image_is_occluded_and_hidden_pixels_differ(textures: Textures) -> None:
    scenes = render(6, 4, HEIGHT, WIDTH, textures, effects=False)
    x = torch.arange(WIDTH) + scenes.flow[:, 0]
    y = torch.arange(HEIGHT)[:, None] + scenes.flow[:, 1]
    outside = (x < -1) | (y < -1) | (x > WIDTH) | (y > HEIGHT)
    assert scenes.occluded[outside].all()
    hidden = scenes.occluded & ~outside
    error = (warp_back(scenes) - scenes.frames[0].float()).abs().mean(dim=1)
    assert hidden.any()
    assert error[hidden].mean() > 5 * error[~scenes.occluded].mean()


def test_a_seed_gives_the_same_scenes_again_and_another_seed_others(textures: Textures) -> None:
    first = render(7, 2, 64, 64, textures)
    again = render(7, 2, 64, 64, textures)
    other = render(8, 2, 64, 64, textures)
    assert torch.equal(first.frames, again.frames)
    assert torch.equal(first.flow, again.flow)
    assert not torch.equal(first.frames, other.frames)


def compare_with_drawn_ahead() -> None:
    torch.set_num_threads(1)
    textures = Textures()
    ahead = draw_ahead(textures, 5, 2, 2, (64, 64), Mixture(driving=0.5))
    for seed, driving in ((7, True), (8, False)):
        first, again = (
            render(seed, 2, 64, 64, source, driving=driving) for source in (textures, next(ahead))
        )
        assert torch.equal(first.frames, again.frames)
        assert torch.equal(first.flow, again.flow)


def test_textures_that_are_drawn_ahead_give_the_same_scenes() -> None:
    # In a process of its own: PyTorch's loader handles SIGCHLD for good in the one that uses it.
    with ProcessPoolExecutor(1, get_context("spawn")) as own:
        own.submit(compare_with_drawn_ahead).result()


def test_small_motions_and_a_long_tail(textures: Textures) -> None:
    lengths = torch.cat(
        [render(seed, 8, 64, 96, textures).flow.norm(dim=1).flatten() for seed in range(8)]
    )
    assert 2 < lengths.median() < 15
    assert lengths.max() > 80
    small = render(3, 8, 64, 96, textures, displacement=0.1).flow.norm(dim=1)
    assert small.median() < 2


def test_a_camera_that_moves_forward_sees_the_ground_move_away_from_a_point(
    textures: Textures,
) -> None:
    flow = torch.cat(
        [render(seed, 8, 96, 128, textures, driving=True).flow for seed in range(4)]
    ).double()
    # The lower edge is nearest: it moves down, and its left and right ends apart.
    assert (flow[:, 1, -1].median(dim=1).values > 0).double().mean() > 0.9
    assert (flow[:, 0, -1, -1] > flow[:, 0, -1, 0]).double().mean() > 0.9
    assert flow.norm(dim=1)[:, -1].median() > 3 * flow.norm(dim=1)[:, 32].median()


def test_kinds_of_scenes_come_in_their_shares() -> None:
    mixture = Mixture(small=0.2, large=0.3, driving=0.1)
    kinds = [mixture.kind(index) for index in range(1000)]
    scales = np.array([scale for scale, _ in kinds])
    assert (scales < 1).mean() == pytest.approx(0.2, abs=0.01)
    assert ((scales >= 2) & (scales <= 4)).mean() == pytest.approx(0.3, abs=0.01)
    assert np.mean([driving for _, driving in kinds]) == pytest.approx(0.1, abs=0.01)


@pytest.mark.parametrize("effect", ["MOTION_BLUR", "FOG", "DEFOCUS"])
def test_effects_change_the_frames_and_the_flow_stays_true(
    smooth: Textures, monkeypatch: pytest.MonkeyPatch, effect: str
) -> None:
    for name in ("MOTION_BLUR", "FOG", "DEFOCUS"):
        monkeypatch.setattr(generator, name, float(name == effect))
    plain = render(9, 2, HEIGHT, WIDTH, smooth, effects=False)
    changed = render(9, 2, HEIGHT, WIDTH, smooth)
    assert not torch.equal(plain.frames, changed.frames)
    if effect != "DEFOCUS":  # which also moves outlines
        assert torch.equal(plain.flow, changed.flow)
    error = (warp_back(changed) - changed.frames[0].float()).abs().amax(dim=1)
    assert error[away_from_edges(~changed.occluded)].median() < 4.0


def test_photographs_and_cutouts_are_drawn_from_a_folder(tmp_path: Path) -> None:
    for kind in ("photos", "cutouts"):
        (tmp_path / kind).mkdir()
    ramp = np.zeros((400, 600, 3), np.uint8)
    ramp[..., 0] = np.linspace(0, 255, 600)
    ramp[..., 2] = 200
    Image.fromarray(ramp).save(tmp_path / "photos" / "a_0000.png")
    bar = np.zeros((20, 10, 4), np.uint8)
    bar[:] = (10, 20, 30, 255)
    Image.fromarray(bar).save(tmp_path / "cutouts" / "a_0000.png")
    textures = Textures(tmp_path)
    random = torch.Generator().manual_seed(0)
    tiles = textures.tiles(20, random)
    photos = tiles[(tiles[:, 2] == 200).all(dim=(1, 2))].float() / 255
    assert len(photos) > 10
    # Pieces of 320 to 400 of the 600 columns, anywhere.
    width = (photos[:, 0, :, -1] - photos[:, 0, :, 0]).mean(dim=1) * 600
    assert 310 < width.min() < width.max() < 405
    assert photos[:, 0, 0, 0].std() > 0.02
    outlines, colourless = textures.outlines(20, 42, random)
    assert 0 < colourless.sum() < 20
    for outline in outlines[~colourless]:
        assert (outline[3] > 127).sum() == 40 * 20  # twice as high as wide, a margin around
        assert outline[:3, 21, 21].tolist() == [10, 20, 30]

"""Measures against loops written from their definitions."""

import numpy as np
import pytest

from flownet2 import measures

HEIGHT, WIDTH = 9, 12


@pytest.fixture
def random() -> np.random.Generator:
    return np.random.default_rng(3)


def field(random: np.random.Generator, deviation: float) -> np.ndarray:
    return random.normal(0, deviation, (HEIGHT, WIDTH, 2)).astype(np.float32)


def bilinear(image: np.ndarray, x: float, y: float) -> np.ndarray | None:
    """The image's value at a point; None outside."""
    if not (0 <= x <= WIDTH - 1 and 0 <= y <= HEIGHT - 1):
        return None
    value = np.zeros(image.shape[2])
    for row in range(HEIGHT):
        for column in range(WIDTH):
            value += image[row, column] * max(0, 1 - abs(x - column)) * max(0, 1 - abs(y - row))
    return value


def test_end_point_error_and_fl(random: np.random.Generator) -> None:
    truth = field(random, 60)
    flow = truth + field(random, 3)
    truth[0, 0] = np.nan
    error, wrong = measures.end_point_error(flow, truth), measures.fl(flow, truth)
    assert np.isnan(error[0, 0])
    assert not wrong[0, 0]
    seen = set()
    for position in list(np.ndindex(HEIGHT, WIDTH))[1:]:
        distance = float(np.linalg.norm(flow[position].astype(float) - truth[position]))
        length = float(np.linalg.norm(truth[position]))
        assert error[position] == pytest.approx(distance)
        assert wrong[position] == (distance > 3 and distance / length > 0.05)
        seen.add((distance > 3, bool(wrong[position])))
    assert seen == {(False, False), (True, False), (True, True)}


def test_warp(random: np.random.Generator) -> None:
    image = random.integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)
    flow = field(random, 4)
    flow[0, 0] = np.nan
    flow[3, 4] = (WIDTH - 1 - 4, HEIGHT - 1 - 3)  # the last pixel itself is inside
    warped = measures.warp(image, flow)
    for y, x in list(np.ndindex(HEIGHT, WIDTH))[1:]:
        value = bilinear(image, x + float(flow[y, x, 0]), y + float(flow[y, x, 1]))
        expected = np.zeros(3) if value is None else value
        np.testing.assert_allclose(warped[y, x], expected, atol=0.01)
    assert (warped[0, 0] == 0).all()
    assert (warped[3, 4] == image[-1, -1]).all()


def test_occluded(random: np.random.Generator) -> None:
    forward = field(random, 3)
    backward = -forward + field(random, 0.3)
    occluded = measures.occluded(forward, backward)
    for y, x in np.ndindex(HEIGHT, WIDTH):
        there = forward[y, x].astype(float)
        back = bilinear(backward, x + there[0], y + there[1])
        if back is None:
            assert occluded[y, x]
            continue
        bound = 0.01 * (there @ there + back @ back) + 0.5
        assert occluded[y, x] == ((there + back) @ (there + back) > bound)
    assert 0 < occluded.mean() < 1
    assert occluded.dtype == bool

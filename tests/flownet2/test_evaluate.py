"""Errors against closed forms, and against loops written from the benchmarks' definitions."""

import numpy as np
import pytest

from flownet2.evaluate import Errors, EvaluationError, groups
from flownet2.measures import nearest_truth

HEIGHT, WIDTH = 8, 10


def constant(u: float, v: float) -> np.ndarray:
    return np.broadcast_to(np.array([u, v], np.float32), (HEIGHT, WIDTH, 2)).copy()


def test_errors_by_motion_occlusion_and_target() -> None:
    truth = constant(3, 4)  # 5 px long
    truth[:2] = (30, 0)  # leaves the image: it is 10 px wide
    truth[7] = np.nan
    flow = truth + np.float32([0, 2])
    flow[2] += np.float32([0, 6])  # off by 8 px
    occluded = np.zeros((HEIGHT, WIDTH), bool)
    occluded[2] = True
    errors = Errors()
    errors.add(np.nan_to_num(flow, nan=77), truth, occluded)
    rows = HEIGHT - 1
    assert errors.counts["all"] == rows * WIDTH
    assert errors.mean() == pytest.approx((6 * 2 + 8) / rows)
    assert errors.fl_all == pytest.approx(1 / rows)
    assert errors.share_beyond(1) == 1
    assert errors.share_beyond(3) == pytest.approx(1 / rows)
    assert errors.share_missing == 0
    assert errors.mean("0-10") == pytest.approx((4 * 2 + 8) / 5)
    assert errors.mean("10-40") == pytest.approx(2)
    assert errors.mean("40+") is None
    assert errors.mean("occluded") == pytest.approx(8)
    assert errors.mean("visible") == pytest.approx(2)
    x, y = np.meshgrid(np.arange(WIDTH), np.arange(HEIGHT))
    leaves = ((x + 3 >= WIDTH) | (y + 4 >= HEIGHT)) & (y >= 2) & (y < 7) | (y < 2)
    assert errors.counts["outside"] == leaves.sum()
    assert errors.counts["inside"] == rows * WIDTH - leaves.sum()


def test_a_pixel_without_a_prediction_is_wrong_and_counts_as_zero_motion() -> None:
    truth = constant(3, 4)
    flow = truth.copy()
    flow[:2] = np.nan
    errors = Errors()
    errors.add(flow, truth)
    assert errors.share_missing == errors.fl_all == errors.share_beyond(3) == 0.25
    assert errors.mean() == pytest.approx(5 / 4)
    still = Errors()
    still.add(np.full_like(truth, np.nan), np.zeros_like(truth))
    assert (still.mean(), still.fl_all) == (0, 1)


def test_pixels_of_all_pairs_count_equally() -> None:
    errors, both = Errors(), Errors()
    errors.add(constant(1, 0), constant(0, 0))
    other = constant(0, 0)
    other[1:] = np.nan
    second = Errors()
    second.add(constant(9, 0), other)
    for part in (errors, second):
        both.merge(part)
    assert both.pairs == 2
    assert both.mean() == pytest.approx((80 * 1 + 10 * 9) / 90)
    assert both.fl_all == pytest.approx(10 / 90)


def test_sizes_that_differ_are_refused() -> None:
    with pytest.raises(EvaluationError, match=r"10x7.*10x8"):
        Errors().add(constant(1, 0)[1:], constant(1, 0))


def test_supersampled_truth_counts_where_it_is_nearest() -> None:
    random = np.random.default_rng(0)
    truth = random.normal(0, 5, (2 * HEIGHT, 2 * WIDTH, 2)).astype(np.float32)
    truth[0:2, 0:2] = np.nan
    truth[2, 2] = np.nan
    flow = random.normal(0, 5, (HEIGHT, WIDTH, 2)).astype(np.float32)
    nearest = nearest_truth(flow, truth)
    assert np.isnan(nearest[0, 0]).all()
    total = 0.0
    for y, x in list(np.ndindex(HEIGHT, WIDTH))[1:]:
        candidates = [truth[2 * y + i, 2 * x + j].astype(float) for i in (0, 1) for j in (0, 1)]
        distances = [np.linalg.norm(c - flow[y, x]) for c in candidates if not np.isnan(c).any()]
        assert np.linalg.norm(nearest[y, x] - flow[y, x]) == pytest.approx(min(distances))
        total += min(distances)
    errors = Errors()
    errors.add(flow, truth, supersampled=True)
    assert errors.mean() == pytest.approx(total / (HEIGHT * WIDTH - 1))


def test_groups_have_the_speeds_that_are_asked_for() -> None:
    truth = constant(0, 0)
    truth[0], truth[1] = (0, 7), (0, 300)
    masks = groups(truth, speeds=(2, 100))
    assert [int(masks[name].sum()) for name in ("0-2", "2-100", "100+")] == [60, 10, 10]

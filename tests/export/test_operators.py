"""The operators in PyTorch against brute-force NumPy."""

import numpy as np
import pytest
import torch

from export.networks import operators
from plugins.correlation_cases import CASES, Case, brute_force
from tests.support.caffe_reference import resample, upsample_aligned, warp


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_correlation(case: Case) -> None:
    a, b = case.inputs()
    volume = operators.correlation(torch.from_numpy(a), torch.from_numpy(b), **case.attributes)
    assert volume.shape == case.output_shape
    np.testing.assert_allclose(volume.numpy(), brute_force(case, a, b), atol=1e-5)


def test_correlation_gradient() -> None:
    a, b = torch.randn(2, 1, 3, 5, 4, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda a, b: operators.correlation(a, b, 4, 1, 4, 1, 2), (a, b))


def test_warp() -> None:
    rng = np.random.default_rng(0)
    image = rng.random((2, 3, 9, 14))
    flow = rng.normal(0, 5, (2, 2, 9, 14))
    flow[:, :, 0, 0] = 0  # exactly on a pixel
    flow[:, 0, 4, 3], flow[:, 1, 4, 3] = 10.5, 0  # between the last column and the edge
    flow[:, 0, 4, 4], flow[:, 1, 4, 4] = 10, 0  # exactly at the edge: outside
    warped = operators.warp(torch.from_numpy(image), torch.from_numpy(flow)).numpy()
    np.testing.assert_allclose(warped, warp(image, flow), atol=1e-12)
    assert np.any(warped[:, :, 4, 3])
    assert not np.any(warped[:, :, 4, 4])


@pytest.mark.parametrize(
    "size", [(20, 31), (64, 128), (32, 32), (20, 40), (13, 10), (5, 31), (19, 60), (40, 8), (5, 62)]
)
def test_resample(size: tuple[int, int]) -> None:
    x = np.random.default_rng(0).random((2, 3, 20, 31))
    y = operators.resample(torch.from_numpy(x), *size, shrink=4).numpy()
    np.testing.assert_allclose(y, resample(x, *size), atol=1e-4)
    if size[0] >= 20 and size[1] >= 31:
        y = operators.resample(torch.from_numpy(x), *size).numpy()
        np.testing.assert_allclose(y, resample(x, *size), atol=1e-4)


def test_upsampling_by_four() -> None:
    x = np.random.default_rng(0).random((2, 2, 5, 3))
    aligned = operators.upsample_aligned(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(aligned, upsample_aligned(x, 20, 12), atol=1e-12)
    nearest = operators.upsample_nearest(torch.from_numpy(x)).numpy()
    np.testing.assert_array_equal(nearest, np.kron(x, np.ones((4, 4))))


def test_channel_norm() -> None:
    x = np.random.default_rng(0).normal(size=(2, 3, 4, 5))
    y = operators.channel_norm(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(y, np.linalg.norm(x, axis=1, keepdims=True))

"""Measures of flow: end-point error, KITTI's Fl, warping and occlusion.

Everything is exact and in NumPy; OpenCV's `remap` rounds positions to 1/32 of a pixel.
"""

from typing import TypeVar

import numpy as np
import numpy.typing as npt

from flownet2.formats import Flow, Mask, known

Value = TypeVar("Value", np.float32, np.complex64)


def end_point_error(flow: Flow, truth: Flow) -> npt.NDArray[np.float64]:
    """Return the distance of each vector from the true one, in pixels, `[H, W]`.

    It is NaN where either is unknown.
    """
    difference = flow.astype(np.float64) - truth
    error: npt.NDArray[np.float64] = np.hypot(difference[..., 0], difference[..., 1])
    return error


def fl(flow: Flow, truth: Flow) -> Mask:
    """Return the mask of pixels whose flow KITTI counts as wrong, bool `[H, W]`.

    A vector is wrong if it is off by more than 3 pixels and by more than 5 % of the true vector's
    length (Menze and Geiger, CVPR 2015). The mean over all pixels with ground truth is Fl-all.
    """
    error = end_point_error(flow, truth)
    wrong: Mask = (error > 3) & (error > 0.05 * np.hypot(truth[..., 0], truth[..., 1]))
    return wrong


def nearest_truth(flow: Flow, truth: Flow) -> Flow:
    """Choose, of the four true vectors of each pixel, the one that is nearest to the flow.

    This is how the Spring benchmark compares flow at the frames' size with ground truth of twice
    the height and width (Mehl et al., CVPR 2023).

    Args:
        flow: `[H, W, 2]`.
        truth: `[2H, 2W, 2]`, in pixels of the flow's grid; NaN where it is unknown.

    Returns:
        float32 `[H, W, 2]`, NaN where all four are unknown.
    """
    height, width, _ = flow.shape
    blocks = truth.reshape(height, 2, width, 2, 2).transpose(0, 2, 1, 3, 4)
    four = blocks.reshape(height, width, 4, 2)
    error = np.hypot(*np.moveaxis(four.astype(np.float64) - flow[:, :, None], 3, 0))
    error[~np.isfinite(error)] = np.inf
    nearest: Flow = np.take_along_axis(four, error.argmin(axis=2)[..., None, None], axis=2)[:, :, 0]
    nearest = nearest.copy()
    nearest[~known(nearest)] = np.nan
    return nearest


def warp(image: npt.NDArray[np.generic], flow: Flow) -> npt.NDArray[np.float32]:
    """Warp an image: return at each x the value of `image` at x + flow(x), bilinear.

    Args:
        image: [H, W, C] of any real type; usually the second frame.
        flow: [H, W, 2].

    Returns:
        float32 [H, W, C], zero where x + flow(x) is outside the image or unknown.
    """
    inside, warped = _sample(image.astype(np.float32, copy=False), flow)
    warped[~inside] = 0
    return warped


def occluded(forward: Flow, backward: Flow) -> Mask:
    """Return the occlusion mask: pixels of the first image hidden in the second, bool [H, W].

    These are the pixels that leave the image, and the pixels at which the forward and the backward
    flow are inconsistent: |f(x) + b(x + f(x))|^2 > 0.01 (|f(x)|^2 + |b(x + f(x))|^2) + 0.5
    (Sundaram, Brox and Keutzer, "Dense Point Trajectories by GPU-Accelerated Large Displacement
    Optical Flow", ECCV 2010).
    """
    # Complex numbers halve the number of lookups and avoid sums over an axis of two.
    there = np.ascontiguousarray(forward, np.float32).view(np.complex64)
    inside, back = _sample(np.ascontiguousarray(backward, np.float32).view(np.complex64), forward)
    consistent: Mask = _square(there + back) <= 0.01 * (_square(there) + _square(back)) + 0.5
    return ~(consistent[..., 0] & inside)


def _square(vectors: npt.NDArray[np.complex64]) -> npt.NDArray[np.float32]:
    return vectors.real**2 + vectors.imag**2


def _sample(image: npt.NDArray[Value], flow: Flow) -> tuple[Mask, npt.NDArray[Value]]:
    """Sample an image at x + flow(x); return the mask of points inside, [H, W], and the values."""
    height, width = flow.shape[:2]
    x = np.arange(width, dtype=np.float32) + flow[..., 0]
    y = np.arange(height, dtype=np.float32)[:, None] + flow[..., 1]
    inside = (x >= 0) & (x <= width - 1) & (y >= 0) & (y <= height - 1)  # False for NaN
    x[~inside] = y[~inside] = 0
    left, top = x.astype(np.intp), y.astype(np.intp)
    right, below = np.minimum(left + 1, width - 1), np.minimum(top + 1, height - 1)
    across, down = (x - left)[..., None], (y - top)[..., None]
    pixels = image.reshape(height * width, -1)

    def row(line: npt.NDArray[np.intp]) -> npt.NDArray[Value]:
        first, second = (pixels.take(line * width + column, axis=0) for column in (left, right))
        second -= first
        second *= across
        second += first
        return second

    upper, lower = row(top), row(below)
    lower -= upper
    lower *= down
    lower += upper
    return inside, lower

"""Numbers of the literature: end-point error, KITTI's Fl, warping and occlusion.

All in NumPy and exact: OpenCV's `remap` rounds positions to 1/32 of a pixel.
"""

from typing import TypeVar

import numpy as np
import numpy.typing as npt

from flownet2.formats import Flow, Mask

Value = TypeVar("Value", np.float32, np.complex64)


def end_point_error(flow: Flow, truth: Flow) -> npt.NDArray[np.float64]:
    """Distance of each vector from the true one, in pixels, [H, W]; NaN where either is unknown."""
    difference = flow.astype(np.float64) - truth
    error: npt.NDArray[np.float64] = np.hypot(difference[..., 0], difference[..., 1])
    return error


def fl(flow: Flow, truth: Flow) -> Mask:
    """Where KITTI counts the flow as wrong, [H, W]: off by more than 3 pixels and by more than 5 %
    of the true vector (Menze and Geiger, CVPR 2015). Its mean over known truth is Fl-all."""
    error = end_point_error(flow, truth)
    wrong: Mask = (error > 3) & (error > 0.05 * np.hypot(truth[..., 0], truth[..., 1]))
    return wrong


def warp(image: npt.NDArray[np.generic], flow: Flow) -> npt.NDArray[np.float32]:
    """The image seen through the flow: at each x the value of `image` at x + flow(x), bilinear.

    Args:
        image: [H, W, C] of any real type; usually the second frame.
        flow: [H, W, 2].

    Returns:
        float32 [H, W, C], zero where x + flow(x) is outside of the image.
    """
    inside, warped = _sample(image.astype(np.float32, copy=False), flow)
    warped[~inside] = 0
    return warped


def occluded(forward: Flow, backward: Flow) -> Mask:
    """Pixels of the first image that the second does not show, bool [H, W].

    Those that leave the image, and those whose way there and back does not end where it began:
    |f(x) + b(x + f(x))|^2 > 0.01 (|f(x)|^2 + |b(x + f(x))|^2) + 0.5 (Sundaram, Brox and Keutzer,
    "Dense Point Trajectories by GPU-Accelerated Large Displacement Optical Flow", ECCV 2010).
    """
    # As complex numbers: half as many values to pick, and no sums over an axis of two.
    there = np.ascontiguousarray(forward, np.float32).view(np.complex64)
    inside, back = _sample(np.ascontiguousarray(backward, np.float32).view(np.complex64), forward)
    consistent: Mask = _square(there + back) <= 0.01 * (_square(there) + _square(back)) + 0.5
    return ~(consistent[..., 0] & inside)


def _square(vectors: npt.NDArray[np.complex64]) -> npt.NDArray[np.float32]:
    return vectors.real**2 + vectors.imag**2


def _sample(image: npt.NDArray[Value], flow: Flow) -> tuple[Mask, npt.NDArray[Value]]:
    """Where x + flow(x) is inside of the image, [H, W], and the image's bilinear values there."""
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

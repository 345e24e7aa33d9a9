"""Colours of flow and of errors: Middlebury's colour circle and KITTI's scale of errors."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from flownet2.formats import Flow

# Steps of the colour circle of Baker et al., "A Database and Evaluation Methodology for Optical
# Flow" (IJCV 2011): from each of the six pure colours to the next.
_CIRCLE = (
    ((255, 0, 0), 15),
    ((255, 255, 0), 6),
    ((0, 255, 0), 4),
    ((0, 255, 255), 11),
    ((0, 0, 255), 13),
    ((255, 0, 255), 6),
)
_STRIP_PIXELS = 2**15
"""Pixels painted at a time: their intermediate arrays fit into a core's cache."""


def colours(flow: Flow, maximum: float | None = None) -> npt.NDArray[np.uint8]:
    """Return the flow in Middlebury's colours, uint8 RGB `[height, width, 3]`.

    The hue is the direction. No motion is white, a motion of `maximum` pixels has the full colour,
    and longer motion is darker. Unknown flow is black.

    Args:
        flow: float32 `[height, width, 2]`, in pixels.
        maximum: length of motion that gets the full colour, in pixels; by default the longest.
    """
    if maximum is None:
        lengths = np.hypot(flow[..., 0], flow[..., 1])
        maximum = float(np.max(lengths, where=np.isfinite(lengths), initial=0))
    longest = np.float32(max(maximum, 1e-30))
    circle = _circle()
    picture = np.empty((*flow.shape[:2], 3), np.uint8)
    rows = max(1, _STRIP_PIXELS // flow.shape[1])
    for top in range(0, len(flow), rows):
        _paint(flow[top : top + rows], longest, circle, picture[top : top + rows])
    return picture


def _paint(
    flow: Flow,
    longest: np.float32,
    circle: npt.NDArray[np.float32],
    picture: npt.NDArray[np.uint8],
) -> None:
    """Write the colours of a flow into a picture of its size."""
    u, v = flow[..., 0], flow[..., 1]
    radius = np.hypot(u, v) / longest
    unknown = ~np.isfinite(radius)
    if unknown.any():
        u, v, radius = (np.where(unknown, np.float32(0), part) for part in (u, v, radius))
    angle = np.arctan2(-v, -u) / np.float32(np.pi)  # -1 to 1
    position = (angle + 1) / 2 * (len(circle) - 1)
    low = position.astype(np.intp)
    share = position - low.astype(np.float32)
    for channel in range(3):  # NumPy is slow along an axis of three
        start, end = circle[:, channel], np.roll(circle[:, channel], -1)
        colour = (1 - share) * start.take(low) + share * end.take(low)
        shade = np.where(radius <= 1, 1 - radius * (1 - colour), colour * np.float32(0.75))
        picture[..., channel] = shade * 255
    picture[unknown] = 0


def _circle() -> npt.NDArray[np.float32]:
    """Return the 55 colours of the circle, from 0 to 1, `[55, 3]`."""
    starts = [np.array(colour, np.float32) for colour, _ in _CIRCLE]
    parts = [
        start + np.trunc((end - start) * np.arange(count, dtype=np.float32)[:, None] / count)
        for (start, end), (_, count) in zip(
            zip(starts, starts[1:] + starts[:1], strict=True), _CIRCLE, strict=True
        )
    ]
    circle: npt.NDArray[np.float32] = np.concatenate(parts) / np.float32(255)
    return circle


# Upper limits of the error colours, as multiples of 3 pixels or of 5 % of the true length,
# whichever is larger, and the colours, from KITTI's development kit. Above 1 the flow is wrong.
ERROR_BOUNDS = tuple(2.0**power for power in range(-4, 5))
ERROR_COLOURS = np.array(
    [
        (49, 54, 149), (69, 117, 180), (116, 173, 209), (171, 217, 233), (224, 243, 248),
        (254, 224, 144), (253, 174, 97), (244, 109, 67), (215, 48, 39), (165, 0, 38),
    ],
    np.uint8,
)  # fmt: skip


def error_colours(flow: Flow, truth: Flow) -> npt.NDArray[np.uint8]:
    """Return the end-point errors in KITTI's colours, uint8 RGB `[height, width, 3]`.

    Blue is correct and red is wrong by KITTI's rule (`flownet2.measures.fl`). Pixels without ground
    truth are black. Pixels without a prediction have the colour of the largest errors.
    """
    error = np.hypot(flow[..., 0] - truth[..., 0], flow[..., 1] - truth[..., 1])
    length = np.hypot(truth[..., 0], truth[..., 1])
    level = error / np.maximum(np.float32(3), np.float32(0.05) * length)
    picture: npt.NDArray[np.uint8] = ERROR_COLOURS[
        np.searchsorted(ERROR_BOUNDS, np.nan_to_num(level, nan=np.inf))
    ]
    picture[~np.isfinite(truth).all(axis=2)] = 0
    return picture

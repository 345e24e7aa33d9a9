"""Optical flow as bytes: JSON, .npy, Middlebury .flo, KITTI PNG, and a picture.

A flow is float32 [height, width, 2]: u to the right and v down, in pixels. Plain NumPy and Pillow,
so that training and evaluation use it too.
"""

import io
import struct
import zlib

import numpy as np
import numpy.typing as npt
import orjson
from PIL import Image

Flow = npt.NDArray[np.float32]

FLO_TAG = 202021.25
"""First float32 of a Middlebury .flo file; its bytes spell PIEH."""

KITTI_SCALE = 64.0
KITTI_ZERO = 2.0**15

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


def to_json(flow: Flow, scale_x: float, scale_y: float) -> bytes:
    """The contract's JSON, each number as short as float32 allows."""
    return orjson.dumps(
        {"flow": flow, "scale_x_back_factor": scale_x, "scale_y_back_factor": scale_y},
        option=orjson.OPT_SERIALIZE_NUMPY,
    )


def to_npy(flow: Flow) -> bytes:
    """A NumPy .npy file, version 1.0."""
    file = io.BytesIO()
    np.save(file, flow, allow_pickle=False)
    return file.getvalue()


def to_flo(flow: Flow) -> bytes:
    """A Middlebury .flo file: tag, width and height, then u and v in turns, little endian."""
    height, width, _ = flow.shape
    return struct.pack("<fii", FLO_TAG, width, height) + flow.astype("<f4", copy=False).tobytes()


def to_kitti(flow: Flow) -> bytes:
    """A KITTI flow PNG: 16-bit RGB of u * 64 + 2^15, v * 64 + 2^15 and 1 where that is in range.

    The format holds flows within +-512 pixels in steps of 1/64; others are marked as invalid
    (all zero), as the KITTI 2015 development kit reads them.
    """
    coded = np.rint(flow * np.float32(KITTI_SCALE) + np.float32(KITTI_ZERO))
    valid = ((coded >= 0) & (coded <= np.iinfo(np.uint16).max)).all(axis=2, keepdims=True)
    return _png16(np.concatenate([np.where(valid, coded, 0), valid], axis=2).astype(np.uint16))


def _png16(pixels: npt.NDArray[np.uint16]) -> bytes:
    """A 16-bit RGB PNG, which Pillow cannot write; every row filtered by its left neighbour."""
    height, width, channels = pixels.shape
    rows = pixels.astype(">u2").view(np.uint8).reshape(height, -1)
    step = channels * 2
    filtered = np.ones((height, 1 + rows.shape[1]), np.uint8)  # filter type 1, "Sub"
    filtered[:, 1 : 1 + step] = rows[:, :step]
    filtered[:, 1 + step :] = rows[:, step:] - rows[:, :-step]

    def chunk(kind: bytes, data: bytes) -> bytes:
        checksum = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", checksum)

    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(filtered.tobytes(), 1))
        + chunk(b"IEND", b"")
    )


def to_picture(flow: Flow, maximum: float | None = None) -> bytes:
    """A PNG of the flow in Middlebury's colours (`colours`)."""
    file = io.BytesIO()
    Image.fromarray(colours(flow, maximum)).save(file, "PNG", compress_level=1)
    return file.getvalue()


def colours(flow: Flow, maximum: float | None = None) -> npt.NDArray[np.uint8]:
    """The flow in Middlebury's colours, uint8 RGB [height, width, 3].

    The hue is the direction; no motion is white, `maximum` pixels (the flow's longest vector when
    None) the full colour, and anything longer darker.
    """
    radius = np.hypot(flow[..., 0], flow[..., 1])
    longest = max(float(radius.max()) if maximum is None else maximum, 1e-30)
    radius = (radius / np.float32(longest))[..., None]
    circle = _circle()
    steps = len(circle)
    turn = np.arctan2(-flow[..., 1], -flow[..., 0]) / np.float32(np.pi)  # -1 to 1
    place = (turn + 1) / 2 * (steps - 1)
    low = np.minimum(place.astype(np.intp), steps - 1)
    share = (place - low)[..., None].astype(np.float32)
    colour = (1 - share) * circle[low] + share * circle[(low + 1) % steps]
    shade = np.where(radius <= 1, 1 - radius * (1 - colour), colour * np.float32(0.75))
    return (shade * 255).astype(np.uint8)


def _circle() -> npt.NDArray[np.float32]:
    """The 55 colours of the circle, from 0 to 1, [55, 3]."""
    starts = [np.array(colour, np.float32) for colour, _ in _CIRCLE]
    parts = [
        start + np.trunc((end - start) * np.arange(count, dtype=np.float32)[:, None] / count)
        for (start, end), (_, count) in zip(
            zip(starts, starts[1:] + starts[:1], strict=True), _CIRCLE, strict=True
        )
    ]
    circle: npt.NDArray[np.float32] = np.concatenate(parts) / np.float32(255)
    return circle

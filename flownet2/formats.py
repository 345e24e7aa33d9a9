"""Flow as files and as bytes: .flo, .npy, .npz, KITTI's PNG, PFM, and pictures in colours.

A flow is float32 `[height, width, 2]`: u to the right and v down, in pixels. Where a file says that
the flow is unknown, both are NaN, and NaN is written as the format's mark of unknown flow.
"""

import io
import os
import struct
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from flownet2 import storage

Flow = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]

FLO_TAG = 202021.25
"""First float32 of a Middlebury .flo file; its bytes spell PIEH."""
FLO_UNKNOWN = 1e9
"""Components larger than this mean unknown flow in a .flo file, which has 1e10 there."""

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


class FormatError(ValueError):
    """A file or a name that cannot be taken as a flow; the message says why."""


def known(flow: Flow) -> Mask:
    """Where the flow is known, bool [height, width]."""
    finite: Mask = np.isfinite(flow).all(axis=2)
    return finite


def to_npy(flow: Flow) -> bytes:
    """A NumPy .npy file, version 1.0."""
    file = io.BytesIO()
    np.save(file, flow, allow_pickle=False)
    return file.getvalue()


def from_npy(content: bytes) -> Flow:
    """The flow of an .npy file; FormatError where it is something else."""
    try:
        return _as_flow(np.load(io.BytesIO(content), allow_pickle=False))
    except (ValueError, EOFError, OSError) as error:
        raise FormatError(f"it is not a .npy file of a flow: {error}") from error


def to_npz(flow: Flow, **more: npt.NDArray[np.generic]) -> bytes:
    """A NumPy .npz file of `flow` and of what else is given by name."""
    file = io.BytesIO()
    np.savez(file, flow=flow, **more)
    return file.getvalue()


def from_npz(content: bytes) -> Flow:
    """The array `flow` of an .npz file; FormatError where there is none."""
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            return _as_flow(arrays["flow"])
    except (ValueError, EOFError, OSError, KeyError, TypeError, zipfile.BadZipFile) as error:
        raise FormatError(f"it is not a .npz file with an array 'flow': {error}") from error


def _as_flow(array: npt.NDArray[np.generic]) -> Flow:
    if array.ndim != 3 or array.shape[2] != 2 or array.dtype.kind != "f":
        raise FormatError(f"it holds {array.dtype} {list(array.shape)}, not [height, width, 2]")
    return array.astype(np.float32, copy=False)


def to_flo(flow: Flow) -> bytes:
    """A Middlebury .flo file: tag, width and height, then u and v in turns, little endian."""
    height, width, _ = flow.shape
    unknown = np.isnan(flow)
    if unknown.any():
        flow = np.where(unknown, np.float32(10 * FLO_UNKNOWN), flow)
    return struct.pack("<fii", FLO_TAG, width, height) + flow.astype("<f4", copy=False).tobytes()


def from_flo(content: bytes) -> Flow:
    """The flow of a Middlebury .flo file; FormatError where it is none, or is cut short."""
    if len(content) < 12 or struct.unpack("<f", content[:4])[0] != FLO_TAG:
        raise FormatError("it is not a Middlebury .flo file")
    width, height = struct.unpack("<ii", content[4:12])
    if min(width, height) < 1 or len(content) != 12 + 8 * width * height:
        raise FormatError(f"it is cut short: {width}x{height} vectors do not fill it")
    flow = np.frombuffer(content, "<f4", offset=12).reshape(height, width, 2).astype(np.float32)
    flow[~(np.abs(flow) < FLO_UNKNOWN).all(axis=2)] = np.nan
    return flow


def to_kitti(flow: Flow) -> bytes:
    """A KITTI flow PNG: 16-bit RGB of u * 64 + 2^15, v * 64 + 2^15 and 1 where that is in range.

    The format holds flows within +-512 pixels in steps of 1/64; others are marked as invalid
    (all zero), as the KITTI 2015 development kit reads them.
    """
    coded = np.rint(flow * np.float32(KITTI_SCALE) + np.float32(KITTI_ZERO))
    valid = ((coded >= 0) & (coded <= np.iinfo(np.uint16).max)).all(axis=2, keepdims=True)
    return _png(np.concatenate([np.where(valid, coded, 0), valid], axis=2).astype(np.uint16))


def from_kitti(content: bytes) -> Flow:
    """The flow of a KITTI flow PNG; FormatError for anything but a PNG of 16-bit RGB."""
    # Pillow reads 16-bit RGB as 8 bits; FFmpeg's decoder does not.
    import av  # noqa: PLC0415  slow to import, and only needed here
    import av.error  # noqa: PLC0415

    try:
        with av.open(io.BytesIO(content), mode="r", format="png_pipe") as file:
            picture = next(file.decode(video=0))
    except (av.error.FFmpegError, StopIteration, IndexError) as error:
        raise FormatError("it is not a PNG file") from error
    if picture.format.name != "rgb48be":
        raise FormatError("it is not a KITTI flow PNG, which has three channels of 16 bits")
    coded = picture.to_ndarray().astype(np.float32)
    flow = (coded[..., :2] - np.float32(KITTI_ZERO)) / np.float32(KITTI_SCALE)
    flow[coded[..., 2] == 0] = np.nan
    return flow


def _png(pixels: npt.NDArray[np.uint8] | npt.NDArray[np.uint16]) -> bytes:
    """An RGB PNG of 8 or 16 bits a channel; every row filtered by its left neighbour.

    Pillow writes none of 16 bits, and takes three times as long to choose filters for those of 8.
    """
    height, width, channels = pixels.shape
    rows = pixels.astype(pixels.dtype.newbyteorder(">")).view(np.uint8).reshape(height, -1)
    step = channels * pixels.itemsize
    filtered = np.ones((height, 1 + rows.shape[1]), np.uint8)  # filter type 1, "Sub"
    filtered[:, 1 : 1 + step] = rows[:, :step]
    filtered[:, 1 + step :] = rows[:, step:] - rows[:, :-step]

    def chunk(kind: bytes, data: bytes) -> bytes:
        checksum = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", checksum)

    header = struct.pack(">IIBBBBB", width, height, 8 * pixels.itemsize, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(filtered.tobytes(), 1))
        + chunk(b"IEND", b"")
    )


def to_pfm(flow: Flow) -> bytes:
    """A PFM file as FlyingThings3D has them: three channels u, v, 0; the lowest row first."""
    height, width, _ = flow.shape
    channels = np.zeros((height, width, 3), "<f4")
    channels[..., :2] = flow[::-1]
    return f"PF\n{width} {height}\n-1.0\n".encode("ascii") + channels.tobytes()


def from_pfm(content: bytes) -> Flow:
    """The flow of a PFM file with three channels; FormatError where it is none."""
    lines = content.split(b"\n", 3)
    try:
        width, height = (int(number) for number in lines[1].split())
        scale = float(lines[2])
    except (IndexError, ValueError):
        width = height = 0
        scale = 0.0
    if lines[0].strip() != b"PF" or min(width, height) < 1 or scale == 0:
        raise FormatError("it is not a PFM file of three channels")
    if len(lines[3]) != 12 * width * height:
        raise FormatError(f"it is cut short: {width}x{height} vectors do not fill it")
    channels = np.frombuffer(lines[3], "<f4" if scale < 0 else ">f4").reshape(height, width, 3)
    return channels[::-1, :, :2].astype(np.float32)


def to_picture(flow: Flow, maximum: float | None = None) -> bytes:
    """A PNG of the flow in Middlebury's colours (`colours`)."""
    return _png(colours(flow, maximum))


def colours(flow: Flow, maximum: float | None = None) -> npt.NDArray[np.uint8]:
    """The flow in Middlebury's colours, uint8 RGB [height, width, 3].

    The hue is the direction; no motion is white, `maximum` pixels (the flow's longest vector when
    None) the full colour, and anything longer darker. Unknown flow is black.
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


_STRIP_PIXELS = 2**15
"""Pixels painted at one time: what is kept for them fits into a core's cache."""


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
        u, v, radius = (np.where(unknown, np.float32(0), one) for one in (u, v, radius))
    turn = np.arctan2(-v, -u) / np.float32(np.pi)  # -1 to 1
    place = (turn + 1) / 2 * (len(circle) - 1)
    low = place.astype(np.intp)
    share = place - low.astype(np.float32)
    for channel in range(3):  # one by one: NumPy is slow along an axis of three
        start, end = circle[:, channel], np.roll(circle[:, channel], -1)
        colour = (1 - share) * start.take(low) + share * end.take(low)
        shade = np.where(radius <= 1, 1 - radius * (1 - colour), colour * np.float32(0.75))
        picture[..., channel] = shade * 255
    picture[unknown] = 0


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


@dataclass(frozen=True)
class Format:
    """How a flow is kept in a file; `decode` is None where the flow cannot be had back."""

    suffix: str
    encode: Callable[[Flow], bytes]
    decode: Callable[[bytes], Flow] | None


FORMATS = {
    "flo": Format(".flo", to_flo, from_flo),
    "npy": Format(".npy", to_npy, from_npy),
    "npz": Format(".npz", to_npz, from_npz),
    "pfm": Format(".pfm", to_pfm, from_pfm),
    "kitti": Format(".png", to_kitti, from_kitti),
    "png": Format(".png", to_picture, None),
}


def read_flow(path: str | os.PathLike[str]) -> Flow:
    """The flow in a file, by its suffix: .flo, .npy, .npz, .pfm, or .png as KITTI has them.

    Raises:
        FormatError: the suffix is another, or the file is not what it says.
        OSError: the file cannot be read.
    """
    path = Path(path)
    for format in FORMATS.values():
        if format.suffix == path.suffix.lower() and format.decode is not None:
            try:
                return format.decode(path.read_bytes())
            except FormatError as error:
                raise FormatError(f"{path} cannot be read as a flow: {error}") from error
    raise FormatError(f"{path} has none of a flow's suffixes: {_suffixes(readable=True)}")


def write_flow(path: str | os.PathLike[str], flow: Flow, format: str | None = None) -> None:
    """Write a flow, whole or not at all, as the suffix says; .png is a picture, unless `format` is
    "kitti".

    Raises:
        FormatError: the suffix, or `format`, is not one of `FORMATS`.
        OSError: the file cannot be written.
    """
    encode = named_format(Path(path).suffix, format).encode
    storage.write(os.fspath(path), encode(flow))


def named_format(suffix: str, name: str | None = None) -> Format:
    """The format of that name, or else that suffix; FormatError where there is none."""
    if name is not None:
        if name not in FORMATS:
            raise FormatError(f"{name} is none of the formats {', '.join(FORMATS)}")
        return FORMATS[name]
    if suffix.lower() == ".png":
        return FORMATS["png"]
    for format in FORMATS.values():
        if format.suffix == suffix.lower():
            return format
    raise FormatError(f"'{suffix}' is none of a flow's suffixes: {_suffixes(readable=False)}")


def _suffixes(readable: bool) -> str:
    return ", ".join(
        dict.fromkeys(one.suffix for one in FORMATS.values() if one.decode or not readable)
    )

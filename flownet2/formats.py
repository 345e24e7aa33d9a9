"""File formats of flow: .flo, .flo5, .npy, .npz, .pfm, HDF5 and KITTI's PNG.

A flow is float32 `[height, width, 2]`: u to the right and v down, in pixels. Where a file marks the
flow as unknown, or holds infinite numbers, both components are NaN; NaN is written as the format's
mark of unknown flow.

Readers check a file's size against its header before they allocate memory.
"""

import io
import math
import os
import re
import struct
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from flownet2 import png
from flownet2.colours import colours
from flownet2.errors import Error, requires_extra
from flownet2.files import write_atomically

Flow = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]

FLO_TAG = 202021.25
"""First float32 of a Middlebury .flo file; its bytes spell PIEH."""
FLO_UNKNOWN = 1e9
"""Components larger than this mean unknown flow in a .flo file, which has 1e10 there."""

KITTI_SCALE = 64.0
KITTI_ZERO = 2.0**15

_DEFLATE_RATIO = 1032
"""Highest compression ratio of deflate, which .npz, HDF5 and PNG use."""

_PFM_HEADER = re.compile(
    rb"PF\s+(\d{1,9})(\s+)(\d{1,9})\s+([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)(?:\r\n|\s)"
)


class FormatError(Error):
    """Raised for a file that is not a flow, or an unknown format; the message says why."""


def known(flow: Flow) -> Mask:
    """Return the mask of pixels with known flow, bool `[height, width]`."""
    return _both(np.isfinite(flow))


def _both(components: Mask) -> Mask:
    """Return the mask of pixels with both components True; NumPy is slow along an axis of two."""
    both: Mask = components[..., 0] & components[..., 1]
    return both


def to_npy(flow: Flow) -> bytes:
    """Return a NumPy .npy file, version 1.0."""
    file = io.BytesIO()
    np.save(file, flow, allow_pickle=False)
    return file.getvalue()


def from_npy(content: bytes) -> Flow:
    """Return the flow of an .npy file of floating-point numbers `[height, width, 2]`.

    Raises:
        FormatError: the file is damaged, or holds something else.
    """
    return _as_flow(_array(content))


def to_npz(flow: Flow, **more: npt.NDArray[np.generic]) -> bytes:
    """Return a NumPy .npz file of the array `flow` and of more arrays by name."""
    file = io.BytesIO()
    np.savez(file, flow=flow, **more)
    return file.getvalue()


def from_npz(content: bytes) -> Flow:
    """Return the array `flow` of an .npz file, or its arrays `u` and `v`, as VIPER has them.

    Raises:
        FormatError: the file is damaged, or has none of these arrays.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            members = {member.filename: member for member in archive.infolist()}
            names = ["flow.npy"] if "flow.npy" in members else ["u.npy", "v.npy"]
            if not members.keys() >= set(names):
                raise FormatError("it has neither an array 'flow' nor arrays 'u' and 'v'")
            if sum(members[name].file_size for name in names) > _DEFLATE_RATIO * len(content):
                raise FormatError("it is damaged: it claims to hold more than it can")
            arrays = [_array(archive.read(name)) for name in names]
    # zipfile raises NotImplementedError and RuntimeError for compressions and encryption.
    except (OSError, ValueError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise FormatError(f"it is not an .npz file, or it is damaged: {error}") from error
    if len(arrays) == 1:
        return _as_flow(arrays[0])
    if arrays[0].shape != arrays[1].shape:
        raise FormatError("its arrays 'u' and 'v' differ in shape")
    return _as_flow(np.stack(arrays, axis=-1))


def _array(content: bytes) -> npt.NDArray[np.generic]:
    """Return the array of an .npy file, after checking its size against its header."""
    file = io.BytesIO(content)
    npy: Any = np.lib.format
    try:
        read = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
        shape, fortran, dtype = read[npy.read_magic(file)](file)
    # The header is a Python literal, whose parser raises many types on a damaged one.
    except Exception as error:
        raise FormatError(f"it is not an .npy file, or it is damaged: {error}") from error
    if dtype.kind != "f":
        raise FormatError(f"it holds {dtype} {list(shape)}, not floating-point numbers")
    size = math.prod(shape)
    if len(content) - file.tell() != size * dtype.itemsize:
        raise FormatError(f"it is cut short: it does not hold {list(shape)} numbers")
    array = np.frombuffer(content, dtype, size, file.tell())
    return array.reshape(shape, order="F" if fortran else "C")


def _as_flow(array: npt.NDArray[np.generic]) -> Flow:
    """Convert an array to a flow that can be written to; unknown vectors become NaN."""
    if array.ndim != 3 or array.shape[2] != 2 or array.dtype.kind != "f" or array.size == 0:
        raise FormatError(f"it holds {array.dtype} {list(array.shape)}, not [height, width, 2]")
    with np.errstate(over="ignore", invalid="ignore"):
        flow = array.astype(np.float32)
    flow[~known(flow)] = np.nan
    return flow


def to_hdf5(flow: Flow) -> bytes:
    """Return an HDF5 file with the dataset `flow`."""
    return _hdf5(flow)


def to_flo5(flow: Flow) -> bytes:
    """Return Spring's .flo5: HDF5 with the dataset `flow`, compressed."""
    return _hdf5(flow, compression="gzip", compression_opts=5)


def _hdf5(flow: Flow, **options: Any) -> bytes:
    file = io.BytesIO()
    with _h5py().File(file, "w") as content:
        content.create_dataset("flow", data=flow, **options)
    return file.getvalue()


def from_hdf5(content: bytes) -> Flow:
    """Return the dataset `flow` of an HDF5 file, such as Spring's .flo5.

    Raises:
        FormatError: the file is damaged, or has no such dataset.
        MissingExtra: h5py is not installed.
    """
    h5py = _h5py()
    try:
        with h5py.File(io.BytesIO(content), "r") as file:
            linked = isinstance(file.get("flow", getlink=True), h5py.HardLink)
            data = file["flow"] if linked else None  # other links may lead to other files
            if not isinstance(data, h5py.Dataset) or data.external or data.is_virtual:
                raise FormatError("it has no dataset 'flow'")
            if data.nbytes > _DEFLATE_RATIO * data.id.get_storage_size():
                raise FormatError("it is damaged: its dataset is larger than its content")
            array = data[()]
    except FormatError:
        raise
    except Exception as error:  # h5py raises OSError, ValueError, KeyError, RuntimeError, …
        raise FormatError(f"it is not an HDF5 file, or it is damaged: {error}") from error
    return _as_flow(np.asarray(array))


def _h5py() -> Any:
    with requires_extra("hdf5"):
        import h5py  # noqa: PLC0415
    return h5py


def to_flo(flow: Flow) -> bytes:
    """Return a Middlebury .flo file: tag, width, height, then u and v of each pixel."""
    height, width, _ = flow.shape
    unknown = ~known(flow)
    if unknown.any():
        flow = np.where(unknown[..., None], np.float32(10 * FLO_UNKNOWN), flow)
    return struct.pack("<fii", FLO_TAG, width, height) + flow.astype("<f4", copy=False).tobytes()


def from_flo(content: bytes) -> Flow:
    """Return the flow of a Middlebury .flo file.

    Raises:
        FormatError: the file has another format, or is cut short.
    """
    if len(content) < 12 or struct.unpack("<f", content[:4])[0] != FLO_TAG:
        raise FormatError("it is not a Middlebury .flo file")
    width, height = struct.unpack("<ii", content[4:12])
    if min(width, height) < 1 or len(content) != 12 + 8 * width * height:
        raise FormatError(_wrong_length(content, width, height))
    flow = np.frombuffer(content, "<f4", offset=12).reshape(height, width, 2).astype(np.float32)
    flow[~_both(np.abs(flow) < FLO_UNKNOWN)] = np.nan
    return flow


def _wrong_length(content: bytes, width: int, height: int) -> str:
    return (
        f"it is cut short or damaged: its header says {width}x{height} vectors, which its "
        f"{len(content)} bytes do not hold"
    )


def to_kitti(flow: Flow) -> bytes:
    """Return a KITTI flow PNG: 16-bit RGB of u * 64 + 2^15, v * 64 + 2^15, and 1 if known.

    Raises:
        FormatError: a vector is beyond the format's range of 512 pixels.
    """
    valid = known(flow)
    coded = np.rint(flow * np.float32(KITTI_SCALE) + np.float32(KITTI_ZERO))
    beyond = valid & ~_both((coded >= 0) & (coded <= np.iinfo(np.uint16).max))
    if beyond.any():
        raise FormatError(
            f"{beyond.sum()} of {beyond.size} vectors ({beyond.mean():.2%}) are beyond the 512 "
            "pixels that KITTI's PNG holds: choose another format, such as .flo"
        )
    coded[~valid] = 0
    return png.encode(np.concatenate([coded, valid[..., None]], axis=2).astype(np.uint16))


def from_kitti(content: bytes) -> Flow:
    """Return the flow of a KITTI flow PNG.

    Raises:
        FormatError: the file is damaged or not a PNG of 16-bit RGB.
        MissingExtra: PyAV is not installed.
    """
    try:
        coded = png.decode_16_bit_rgb(content).astype(np.float32)
    except png.PngError as error:
        raise FormatError(str(error)) from error
    flow = (coded[..., :2] - np.float32(KITTI_ZERO)) / np.float32(KITTI_SCALE)
    flow[coded[..., 2] == 0] = np.nan
    return flow


def to_pfm(flow: Flow) -> bytes:
    """Return a PFM file as FlyingThings3D has them: channels u, v, 0; the lowest row first."""
    height, width, _ = flow.shape
    channels = np.zeros((height, width, 3), "<f4")
    channels[..., :2] = flow[::-1]
    return f"PF\n{width} {height}\n-1.0\n".encode("ascii") + channels.tobytes()


def from_pfm(content: bytes) -> Flow:
    """Return the flow of a PFM file with three channels.

    The lowest row comes first, except in files of Adobe Photoshop, which has the highest first and
    is recognised by its width and height on separate lines.

    Raises:
        FormatError: the file has another format, or is cut short.
    """
    header = _PFM_HEADER.match(content)
    scale = float(header[4]) if header else 0.0
    if not header or scale == 0 or not math.isfinite(scale):
        raise FormatError("it is not a PFM file of three channels")
    width, height = int(header[1]), int(header[3])
    size = 12 * width * height
    if size == 0 or len(content) - header.end() != size:
        raise FormatError(_wrong_length(content, width, height))
    channels = np.frombuffer(content, "<f4" if scale < 0 else ">f4", offset=header.end())
    flow = channels.reshape(height, width, 3)[..., :2]
    return _as_flow(flow if b"\n" in header[2] else flow[::-1])


def to_picture(flow: Flow, maximum: float | None = None) -> bytes:
    """Return a PNG of the flow in Middlebury's colours (`flownet2.colours`)."""
    return png.encode(colours(flow, maximum))


@dataclass(frozen=True)
class Format:
    """A file format of flow; `decode` is None for pictures, which do not hold the flow."""

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
    "hdf5": Format(".h5", to_hdf5, from_hdf5),
    "flo5": Format(".flo5", to_flo5, from_hdf5),
}
READABLE = {format.suffix: format.decode for format in FORMATS.values() if format.decode}
"""Readers by suffix."""


def read_flow(path: str | os.PathLike[str]) -> Flow:
    """Read a flow from a file: .flo, .flo5, .h5, .npy, .npz, .pfm, or KITTI's .png.

    Returns:
        float32 `[height, width, 2]`, u to the right and v down, in pixels; NaN where the file
        marks the flow as unknown.

    Raises:
        FormatError: the suffix is unknown, or the file is damaged or does not match its suffix.
        OSError: the file cannot be read.
    """
    path = Path(path)
    decode = READABLE.get(path.suffix.lower())
    if decode is None:
        raise FormatError(f"{path} has none of the suffixes of flow files: {', '.join(READABLE)}")
    try:
        return decode(path.read_bytes())
    except FormatError as error:
        raise FormatError(f"{path} cannot be read as a flow: {error}") from error


def write_flow(path: str | os.PathLike[str], flow: Flow, format: str | None = None) -> None:
    """Write a flow to a file, atomically.

    Args:
        path: the file; its suffix decides the format. `.png` is a picture in colours.
        flow: floating-point numbers `[height, width, 2]`; NaN for unknown flow.
        format: a name in `FORMATS`, such as "kitti", if the suffix should not decide.

    Raises:
        FormatError: the suffix or `format` is unknown, `flow` has another shape, or the format
            cannot hold it.
        OSError: the file cannot be written.
    """
    encode = named_format(Path(path).suffix, format).encode
    try:
        content = encode(_as_flow(np.asarray(flow)))
    except FormatError as error:
        raise FormatError(f"{path} cannot be written: {error}") from error
    write_atomically(path, content)


def named_format(suffix: str, name: str | None = None) -> Format:
    """Return the format of that name, or else of that suffix; raise FormatError if unknown."""
    if name is not None:
        if name not in FORMATS:
            raise FormatError(f"{name} is none of the formats {', '.join(FORMATS)}")
        return FORMATS[name]
    if suffix.lower() == ".png":
        return FORMATS["png"]
    for format in FORMATS.values():
        if format.suffix == suffix.lower():
            return format
    suffixes = ", ".join(dict.fromkeys(format.suffix for format in FORMATS.values()))
    raise FormatError(f"'{suffix}' is none of the suffixes of flow files: {suffixes}")

"""PNG files of 8 and 16 bits a channel; Pillow neither reads nor writes RGB of 16 bits."""

import io
import struct
import zlib
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from flownet2.errors import Error, requires_extra

SIGNATURE = b"\x89PNG\r\n\x1a\n"
_NONE, _SUB = 0, 1
"""PNG's filter types."""
_RGB = 2
"""PNG's colour type of RGB without alpha."""


class PngError(Error):
    """Raised for a damaged PNG file or an unsupported kind of PNG; the message says why."""


def _deflate(data: memoryview) -> bytes:
    return zlib.compress(data, 1)


def encode(
    pixels: npt.NDArray[np.uint8] | npt.NDArray[np.uint16],
    compressed: bool = True,
    deflate: Callable[[memoryview], bytes] = _deflate,
) -> bytes:
    """Return an RGB PNG of uint8 or uint16 pixels `[height, width, 3]`.

    Rows use PNG's filter "Sub" (difference to the left pixel), three times as fast as Pillow's
    choice of filters. With `compressed` False they are not filtered.

    Args:
        pixels: the picture.
        compressed: True to compress it.
        deflate: function that compresses bytes to the zlib format.
    """
    height, width, channels = pixels.shape
    rows = pixels.astype(pixels.dtype.newbyteorder(">")).view(np.uint8).reshape(height, -1)
    filtered = np.empty((height, 1 + rows.shape[1]), np.uint8)
    filtered[:, 0] = _SUB if compressed else _NONE
    filtered[:, 1:] = rows
    if compressed:
        step = channels * pixels.itemsize
        filtered[:, 1 + step :] -= rows[:, :-step]

    def chunk(kind: bytes, data: bytes) -> bytes:
        checksum = zlib.crc32(data, zlib.crc32(kind))
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", checksum)

    header = struct.pack(">IIBBBBB", width, height, 8 * pixels.itemsize, _RGB, 0, 0, 0)
    return (
        SIGNATURE
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", deflate(filtered.data) if compressed else zlib.compress(filtered.data, 0))
        + chunk(b"IEND", b"")
    )


def decode_16_bit_rgb(content: bytes) -> npt.NDArray[np.uint16]:
    """Return the pixels of a PNG of 16-bit RGB, uint16 `[height, width, 3]`.

    Raises:
        PngError: the file is damaged, cut off or of another kind.
        MissingExtra: PyAV is not installed.
    """
    _check(content)
    with requires_extra("cli"):
        import av  # noqa: PLC0415  slow to import
        import av.error  # noqa: PLC0415
    try:
        with av.open(io.BytesIO(content), mode="r", format="png_pipe") as file:
            picture = next(file.decode(video=0))
    except (av.error.FFmpegError, StopIteration, IndexError) as error:
        raise PngError("it is not a PNG file") from error
    return picture.to_ndarray().astype(np.uint16, copy=False)


def _check(content: bytes) -> None:
    """Check header and checksums: FFmpeg returns pictures of damaged files without an error."""
    if not content.startswith(SIGNATURE):
        raise PngError("it is not a PNG file")
    position, data, kind = len(SIGNATURE), bytearray(), b""
    header = b""
    while kind != b"IEND":
        if len(content) < position + 12:
            raise PngError("it is cut off")
        size, kind = struct.unpack_from(">I4s", content, position)
        body = content[position + 8 : position + 8 + size]
        checksum = content[position + 8 + size : position + 12 + size]
        if len(checksum) < 4:
            raise PngError("it is cut off")
        if checksum != struct.pack(">I", zlib.crc32(kind + body)):
            raise PngError("it is damaged: a checksum is wrong")
        if kind == b"IHDR":
            header = body
        elif kind == b"IDAT":
            data += body
        position += 12 + size
    if len(header) != 13:
        raise PngError("it is damaged: it has no header")
    width, height, depth, colour, _, _, interlaced = struct.unpack(">IIBBBBB", header)
    if (depth, colour, interlaced) != (16, _RGB, 0):
        raise PngError("it is a picture, not a PNG with three channels of 16 bits")
    expected = height * (1 + 6 * width)
    inflate = zlib.decompressobj()
    try:
        rows = inflate.decompress(bytes(data), expected + 1)
    except zlib.error as error:
        raise PngError(f"it is damaged: {error}") from error
    if not 0 < expected == len(rows):
        raise PngError(f"it is damaged: its data is not of {width}x{height} pixels")

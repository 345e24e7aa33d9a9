"""Guards against hostile image files, in each format, before Pillow sees a file.

A decoder's time and memory must follow from the size of the body and of the image. The guards
reject other files, and remove metadata, which is not used here.
"""

import io
import re
import struct
from collections.abc import Callable

from PIL import Image, ImageFile

MAX_SIDE = 65_500
"""Largest side of an image in pixels, libjpeg's limit. Resizing takes time and memory for every
pixel of a side, whatever the other side is, and blocks all other threads meanwhile."""

MAX_PARTS = 20_000
"""Largest number of chunks of a PNG or WebP, boxes of an AVIF, and segments before the pixels of a
JPEG. Decoders allocate memory for each, however short. 64 MB in chunks of 4 KB have fewer."""

MAX_GIF_BLOCKS = 2**18
"""Largest number of blocks of a GIF. A block holds up to 255 bytes, so 64 MB have fewer."""

MAX_SCANS = 100
"""Largest number of scans of a JPEG; ten are usual. Each visits all pixels."""

MAX_TIFF_VALUE_BYTES = 2**20
"""Largest value of a TIFF tag: offsets for `MAX_SIDE` strips fit."""

# JPEG markers by their second byte: start of scan and end of image; fill bytes, stuffing and
# restarts; comments and application segments except JFIF (0xE0) and Adobe (0xEE).
_SCAN_OR_END = (0xDA, 0xD9)
_WITHOUT_LENGTH = (0xFF, 0x00, 0x01, *range(0xD0, 0xD9))
_METADATA = (*range(0xE1, 0xEE), 0xEF, 0xFE)

_PNG = b"\x89PNG\r\n\x1a\n"

_GIF_GRAPHIC_CONTROL = 0xF9
"""Label of the extension that names the transparent colour."""

_LONG = 4
_TIFF_TYPE_BYTES = {1: 1, 2: 1, 3: 2, _LONG: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8}
"""Bytes of a value of each TIFF type."""
_TIFF_SIDES = (256, 257, 322, 323)
"""Tags of the sides of the image and of its tiles."""
_TIFF_SUPPORTED = {
    259: ("compression", (1, 5, 8, 32946, 32773)),  # none, LZW, Deflate (two codes), PackBits
    339: ("sample format", (1, 3)),  # unsigned integers, floats
}
_TIFF_TAGS = {*_TIFF_SIDES, *_TIFF_SUPPORTED, 258, 262, 266, 273, 277, 278, 279, 284, 317, 320}
_TIFF_TAGS |= {324, 325, 338}
"""Tags that describe how to decode the pixels."""

_PNM_HEAD = re.compile(rb"P([456])\s(?:\s*#[^\n]*\n)*\s*(\d+)\s+(\d+)(?:\s+(\d+))?\s")


class SeveralFrames(ValueError):
    """Raised for a file with more than one frame or page."""


class UnsupportedVariant(ValueError):
    """Raised for a valid file in a variant of its format that is not decoded here."""


def sanitise(data: bytes) -> bytes:
    """Return a file of any format without metadata and without excessive parts.

    Raises:
        SeveralFrames, UnsupportedVariant: see there.
        ValueError, IndexError, struct.error: the file is damaged, or has too many parts.
    """
    for start, guard in _GUARDS.items():
        if data.startswith(start):
            return guard(data)
    return _isobmff(data) if data[4:8] == b"ftyp" else data


def check_decoding(image: Image.Image) -> None:
    """Check an opened image, before it is decoded.

    Raises:
        ValueError: its pixels are decoded many times.
    """
    if not isinstance(image, ImageFile.ImageFile):
        return
    if scans(image) > MAX_SCANS:
        raise ValueError(f"more than {MAX_SCANS} scans")
    # The strips of a TIFF may overlap. A separate plane for each of up to six samples is usual.
    tiles = [tile.extents for tile in image.tile if tile.extents]
    area = sum((right - left) * (bottom - top) for left, top, right, bottom in tiles)
    if area > 8 * max(image.width * image.height, MAX_SIDE):
        raise ValueError("strips that overlap")


def scans(image: Image.Image) -> int:
    """Return the number of scans of a JPEG, or 0 for another format."""
    if image.format != "JPEG":
        return 0
    assert isinstance(image, ImageFile.ImageFile)
    assert isinstance(image.fp, io.BytesIO)
    return image.fp.getvalue().count(b"\xff\xda")


def _jpeg(data: bytes) -> bytes:
    """Remove comments and application segments except JFIF's and Adobe's, which say how to decode.

    Pillow joins the segments of EXIF in quadratic time, logs a warning for every tag that it cannot
    read, and treats a file with a directory of further images (MPO) as another format.
    """
    kept, offset = [b"\xff\xd8"], 2
    for _ in range(MAX_PARTS):
        offset = data.index(b"\xff", offset)  # decoders skip other bytes between segments
        marker = data[offset + 1]
        if marker in _SCAN_OR_END:
            return b"".join((*kept, memoryview(data)[offset:]))
        if marker in _WITHOUT_LENGTH:
            offset += 1
            continue
        end = offset + 2 + int.from_bytes(data[offset + 2 : offset + 4])
        if marker not in _METADATA:
            kept.append(data[offset:end])
        offset = end
    raise ValueError(f"more than {MAX_PARTS} segments before the pixels")


def _count_parts(data: bytes, start: int, length: Callable[[int], int]) -> bytes:
    """Return the file if it has at most `MAX_PARTS` parts.

    Args:
        data: the file.
        start: offset of its first part.
        length: returns the length of the part at an offset.
    """
    offset = start
    for _ in range(MAX_PARTS):
        offset += length(offset)
        if offset >= len(data):
            return data
    raise ValueError(f"more than {MAX_PARTS} chunks")


def _png(data: bytes) -> bytes:
    return _count_parts(data, 8, lambda at: 12 + int.from_bytes(data[at : at + 4]))


def _riff(data: bytes) -> bytes:
    def length(at: int) -> int:
        size = int.from_bytes(data[at + 4 : at + 8], "little")
        return 8 + size + size % 2

    return _count_parts(data, 12, length)


def _isobmff(data: bytes) -> bytes:
    """Limit the boxes at the top of an AVIF, and hide its EXIF, which Pillow parses like a TIFF.

    libavif itself limits the boxes inside.
    """
    hidden = bytearray(data)

    def length(at: int) -> int:
        size = int.from_bytes(data[at : at + 4])
        end = at + size if size >= 8 else len(data)  # 0: the rest; 1: 64 bits, longer than a body
        if data[at + 4 : at + 8] in (b"meta", b"moov"):
            hidden[at:end] = data[at:end].replace(b"Exif", b"skip")
        return end - at

    _count_parts(data, 0, length)
    return bytes(hidden)


def _gif(data: bytes) -> bytes:
    """Keep the frame of a GIF, without comments and other extensions.

    Pillow joins the blocks of comments in quadratic time.
    """
    offset = 13 + _gif_table(data[10])
    kept, frame = [data[:offset]], False
    blocks = 0
    while (kind := data[offset : offset + 1]) not in (b"", b";"):
        start = offset
        if kind == b",":
            if frame:
                raise SeveralFrames
            frame = True
            offset += 11 + _gif_table(data[offset + 9])
        elif kind == b"!":
            offset += 2
        else:
            raise ValueError("an unknown block")
        while size := data[offset]:
            offset += 1 + size
            blocks += 1
            if blocks > MAX_GIF_BLOCKS:
                raise ValueError(f"more than {MAX_GIF_BLOCKS} blocks")
        offset += 1
        if kind == b"," or data[start + 1] == _GIF_GRAPHIC_CONTROL:
            kept.append(data[start:offset])
        blocks += 1
    return b"".join((*kept, b";"))


def _gif_table(flags: int) -> int:
    """Return the bytes of a colour table."""
    return 3 << (flags & 7) + 1 if flags & 0x80 else 0


def _bmp(data: bytes) -> bytes:
    """Reject run lengths, which Pillow decodes in Python."""
    header, compression = struct.unpack_from("<I12xI", data, 14)
    if header >= 40 and compression not in (0, 3):
        raise UnsupportedVariant("a compressed BMP")
    return data


def _tiff(data: bytes) -> bytes:
    """Keep the tags of the first page that describe its pixels.

    Pillow reads the values of all tags, which may overlap, and follows the directories of EXIF and
    of further pages in quadratic time.
    """
    order = "<" if data.startswith(b"II") else ">"
    (offset,) = struct.unpack_from(f"{order}I", data, 4)
    (count,) = struct.unpack_from(f"{order}H", data, offset)
    (following,) = struct.unpack_from(f"{order}I", data, offset + 2 + 12 * count)
    if following:
        raise SeveralFrames
    kept, numbers = {}, {}
    for index in range(count):
        at = offset + 2 + 12 * index
        tag, kind, values = struct.unpack_from(f"{order}HHI", data, at)
        if tag not in _TIFF_TAGS:
            continue
        size = values * _TIFF_TYPE_BYTES.get(kind, 1)
        if size > MAX_TIFF_VALUE_BYTES:
            raise ValueError("a tag that is too long")
        place = at + 8  # up to four bytes fit into the entry; more are elsewhere
        if size > 4:
            (place,) = struct.unpack_from(f"{order}I", data, place)
        (numbers[tag],) = struct.unpack_from(f"{order}{'I' if kind == _LONG else 'H'}", data, place)
        kept[tag] = data[at : at + 12]
    for tag, (name, supported) in _TIFF_SUPPORTED.items():
        if numbers.get(tag, 1) not in supported:
            raise UnsupportedVariant(f"a TIFF with {name} {numbers[tag]}")
    width, height, tile_width, tile_height = (numbers.get(tag, 1) for tag in _TIFF_SIDES)
    if tile_width * tile_height > 4 * max(width * height, MAX_SIDE):
        raise ValueError("tiles that are larger than the image")
    directory = struct.pack(f"{order}H", len(kept)) + b"".join(kept.values()) + bytes(4)
    return b"".join((data[:offset], directory, memoryview(data)[offset + len(directory) :]))


def _pnm(data: bytes) -> bytes:
    """Accept the variants of PPM and PGM that Pillow does not decode in Python."""
    head = _PNM_HEAD.match(data[:1000])
    if not head:
        raise ValueError("no header")
    kind, maximum = head[1], int(head[4] or 1)
    if maximum != {b"4": 1, b"5": maximum if maximum == 65535 else 255, b"6": 255}[kind]:
        raise UnsupportedVariant(f"a P{kind.decode()} with the maximum {maximum}")
    return data


def _plain_pnm(_: bytes) -> bytes:
    raise UnsupportedVariant("a PPM of text")


# First bytes of a file -> its guard.
_GUARDS: dict[bytes, Callable[[bytes], bytes]] = {
    b"\xff\xd8": _jpeg,
    _PNG: _png,
    b"RIFF": _riff,
    b"GIF8": _gif,
    b"BM": _bmp,
    b"II*\0": _tiff,
    b"MM\0*": _tiff,
    **dict.fromkeys((b"P1", b"P2", b"P3"), _plain_pnm),
    **dict.fromkeys((b"P4", b"P5", b"P6"), _pnm),
}

"""Hostile and unusual image files, as pairs of a name and bytes."""

import base64
import io
import struct
import zlib
from collections.abc import Iterator

import numpy as np
from PIL import Image, PngImagePlugin

from tests.support.gateway_stack import encoded, picture


def chunk(kind: bytes, data: bytes) -> bytes:
    """A PNG chunk."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(
    width: int, height: int, data: bytes, *extra: bytes, depth: int = 8, colour: int = 0
) -> bytes:
    """A PNG from its parts, which may be wrong."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    chunks = [chunk(b"IHDR", header), *extra, chunk(b"IDAT", data), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def png_chunk_ends(data: bytes) -> list[int]:
    """Return the offset of the end of each chunk of a PNG."""
    ends, offset = [], 8
    while offset < len(data):
        offset += 12 + struct.unpack_from(">I", data, offset)[0]
        ends.append(offset)
    return ends


def tiff(tags: dict[int, tuple[int, list[int]]], data: bytes = b"", next_page: int = 0) -> bytes:
    """A little-endian TIFF: tag -> type (3: short, 4: long) and values; the data start at 8."""
    entries, values = b"", b""
    directory = 8 + len(data)
    after = directory + 2 + 12 * len(tags) + 4
    for tag, (kind, numbers) in sorted(tags.items()):
        packed = struct.pack(f"<{len(numbers)}{'H' if kind == 3 else 'I'}", *numbers)
        if len(packed) > 4:
            place = struct.pack("<I", after + len(values))
            values += packed
        else:
            place = packed.ljust(4, b"\0")
        entries += struct.pack("<HHI", tag, kind, len(numbers)) + place
    head = struct.pack("<H", len(tags)) + entries + struct.pack("<I", next_page)
    return b"II*\0" + struct.pack("<I", directory) + data + head + values


def grey_tiff(
    width: int = 64, height: int = 48, bits: int = 8, **more: tuple[int, list[int]]
) -> dict[int, tuple[int, list[int]]]:
    """Tags of an uncompressed grey TIFF of one strip; `more` has further ones, as `t259`."""
    return {
        256: (4, [width]),
        257: (4, [height]),
        258: (3, [bits]),
        259: (3, [1]),
        262: (3, [1]),
        273: (4, [8]),
        277: (3, [1]),
        278: (4, [height]),
        279: (4, [width * height * bits // 8]),
        **{int(name[1:]): value for name, value in more.items()},
    }


def gif_comments(gif: bytes, count: int, text: bytes = b"a") -> bytes:
    """A GIF with comments in front of its frame."""
    start = 13 + (3 << (gif[10] & 7) + 1 if gif[10] & 0x80 else 0)
    comment = b"!\xfe" + bytes([len(text)]) + text + b"\0"
    return gif[:start] + comment * count + gif[start:]


def bomb_text(kind: bytes) -> bytes:
    """A text chunk of a few KB that expands to 64 MB."""
    packed = zlib.compress(b"a" * 2**26, 9)
    head = b"Comment\0\0" if kind == b"zTXt" else b"Comment\0\1\0\0\0"
    return chunk(kind, head + packed)


def truncations() -> Iterator[tuple[str, bytes]]:
    """Truncated files: a PNG at and inside every chunk, others along their length."""
    info = PngImagePlugin.PngInfo()
    info.add_text("Comment", "x" * 100)
    whole = encoded(picture(1), pnginfo=info)
    pixels_end = png_chunk_ends(whole)[-2]
    for end in png_chunk_ends(whole)[:-1]:
        for offset in (end - 20, end):
            if offset < pixels_end:  # after that nothing important is missing
                yield f"png-cut-{offset}", whole[:offset]
    for format in ("JPEG", "WEBP", "AVIF", "BMP", "TIFF", "PPM"):
        data = encoded(picture(1), format)
        for part in (0.1, 0.5, 0.9):
            yield f"{format.lower()}-cut-{part}", data[: int(len(data) * part)]


def bad_images() -> Iterator[tuple[str, bytes]]:
    """Files that must be rejected."""
    whole = encoded(picture(1))
    yield from truncations()
    yield "empty-png", whole[:8]
    yield "text", b"hello, world"
    yield "zeros", bytes(1000)
    yield "wrong-crc", whole[:29] + bytes(4) + whole[33:]
    damaged = bytearray(whole)
    damaged[len(whole) // 2] ^= 0xFF
    yield "flipped-byte", bytes(damaged)
    pixels = zlib.compress(bytes(17 * 16))
    yield "no-pixels", png(16, 16, b"")
    yield "pixels-not-deflate", png(16, 16, b"\xff" * 100)
    yield "zero-wide", png(0, 16, pixels)
    yield "absurd-size", png(2**31 - 1, 2**31 - 1, pixels)
    yield "bomb-by-size", png(50_000, 50_000, zlib.compress(bytes(1000)))
    # Wide and thin: few pixels, and a side that takes minutes to resize.
    yield "10000000-wide", png(10_000_000, 1, zlib.compress(bytes(10_000_001)))
    yield "65501-high", png(1, 65_501, zlib.compress(bytes(2 * 65_501)))
    yield "jpeg-many-scans", many_scans(encoded(picture(1), "JPEG", progressive=True), 200)
    yield "bad-filter", png(16, 16, zlib.compress(b"\x09" * 17 * 16))
    yield "bad-depth", png(16, 16, pixels, depth=7)
    yield "ztxt-bomb", png(16, 16, pixels, bomb_text(b"zTXt"))
    yield "itxt-bomb", png(16, 16, pixels, bomb_text(b"iTXt"))
    yield (
        "iccp-bomb",
        png(16, 16, pixels, chunk(b"iCCP", b"p\0\0" + zlib.compress(bytes(2**26), 9))),
    )
    yield (
        "many-texts",
        png(16, 16, pixels, *[chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(900_000)))] * 40),
    )
    jpeg = encoded(picture(1), "JPEG")
    yield "png-many-chunks", png(16, 16, pixels, chunk(b"prVt", b"") * 30_000)
    yield "jpeg-many-segments", jpeg[:2] + b"\xff\xe5\0\2" * 30_000 + jpeg[2:]
    yield "jpeg-filled", jpeg[:2] + b"\xff" * 30_000 + jpeg[2:]
    webp = encoded(picture(1), "WEBP")
    parts = webp[8:] + b"abcd\0\0\0\0" * 30_000
    yield "webp-many-chunks", b"RIFF" + struct.pack("<I", len(parts)) + parts
    frames = [picture(seed) for seed in range(3)]
    for format in ("WEBP", "PNG", "AVIF", "TIFF"):
        yield (
            f"animated-{format.lower()}",
            encoded(frames[0], format, save_all=True, append_images=frames[1:]),
        )
    yield "animated-gif", encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    for format in ("ICO", "PDF", "JPEG2000"):
        yield format.lower(), encoded(frames[0], format)
    yield "base64", base64.b64encode(whole)
    yield from bad_tiffs()
    gif = encoded(frames[0], "GIF")
    yield "gif-without-frame", gif[:13]
    yield "gif-cut", gif[:-20]
    yield "gif-many-blocks", gif_comments(gif, 300_000)
    yield "gif-bomb", gif[:6] + b"\xff\xff\xff\xff" + gif[10:]
    bmp = encoded(frames[0].convert("P"), "BMP")
    yield "bmp-run-lengths", bmp[:30] + b"\1" + bmp[31:]
    yield "bmp-bomb", bmp[:18] + struct.pack("<II", 50_000, 50_000) + bmp[26:]
    yield "ppm-of-text", b"P3 2 2 255\n" + b"1 2 3 " * 4
    yield "pgm-of-10-bits", b"P5 16 16 1023\n" + bytes(512)
    yield "ppm-of-16-bits", b"P6 16 16 65535\n" + bytes(1536)
    yield "ppm-bomb", b"P6 50000 50000 255\n" + bytes(100)
    yield "ppm-comment", b"P6 #" + b"x" * 10**6
    avif = encoded(picture(1), "AVIF")
    yield "avif-many-boxes", avif + b"\0\0\0\x08free" * 30_000
    # Polyglots: a PDF and a script that hold a picture, a PNG's name on a JPEG's bytes.
    yield "pdf-then-png", encoded(frames[0], "PDF") + whole
    yield "script-then-png", b"<script>alert(1)</script>" + whole
    yield "png-head-jpeg-body", whole[:8] + encoded(frames[0], "JPEG")
    webp = encoded(picture(1, 64, 64), "WEBP", lossless=True)
    # A canvas of 16383 x 16383 announced in front of a small picture.
    canvas = b"\x00\x00\x00\x00" + (16382).to_bytes(3, "little") * 2
    body = b"VP8X" + struct.pack("<I", 10) + canvas + webp[12:]
    yield "webp-canvas-bomb", b"RIFF" + struct.pack("<I", len(body) + 4) + b"WEBP" + body
    exif = b"Exif\0\0MM\0*\0\0\0\x08" + b"\xff" * 60
    yield "jpeg-cut-in-exif", jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif[:30]


def bad_tiffs() -> Iterator[tuple[str, bytes]]:
    """TIFFs that must be rejected."""
    pixels = bytes(64 * 48)
    yield "tiff-jpeg", encoded(picture(1), "TIFF", compression="jpeg")
    for name in ("tiff_deflate", "tiff_lzw"):
        file = encoded(picture(1), "TIFF", compression=name)
        (at,) = struct.unpack("<I", file[4:8])
        start = 8 if at > 1000 else len(file) - 1000
        yield f"tiff-damaged-{name}", file[:start] + b"\xff" * 500 + file[start + 500 :]
    yield "tiff-of-signed", tiff(grey_tiff(bits=16, t339=(3, [2])), bytes(2 * 64 * 48))
    yield "tiff-of-integers", encoded(Image.fromarray(np.zeros((48, 64), np.int32)), "TIFF")
    yield "tiff-of-unsigned-32", tiff(grey_tiff(bits=32), bytes(4 * 64 * 48))
    for name, value in (("nan", np.nan), ("infinite", np.inf), ("255", 255), ("negative", -0.1)):
        floats = np.full((48, 64), 0.5, np.float32)
        floats[20, 30] = value
        yield f"tiff-{name}", encoded(Image.fromarray(floats), "TIFF")
    # Each strip has all rows, and more: 20,000 times the work.
    strips = {278: (4, [100]), 273: (4, [8] * 20_000), 279: (4, [64 * 48] * 20_000)}
    yield "tiff-overlapping-strips", tiff(grey_tiff() | strips, pixels)
    yield "tiff-without-pixels", tiff({tag: (4, [1]) for tag in range(1000, 60_000)})
    yield (
        "tiff-huge-tile",
        tiff(
            {**grey_tiff(), 322: (4, [2**20]), 323: (4, [2**11]), 324: (4, [8]), 325: (4, [3072])}
            | {259: (3, [5])},
            pixels,
        ),
    )
    yield "tiff-endless-pages", tiff(grey_tiff(), pixels, next_page=8 + len(pixels))
    yield "tiff-bomb", tiff(grey_tiff(50_000, 50_000), pixels)
    yield "tiff-directory-outside", b"II*\0\xff\xff\xff\xff" + pixels
    yield "tiff-long-tag", tiff(grey_tiff(t320=(3, [0] * 2**20)), pixels)
    yield "bigtiff", b"II+\0" + bytes(60)


def no_palette() -> bytes:
    """A PNG of palette indices without a palette."""
    coloured = zlib.compress((b"\0" + bytes(64)) * 64)
    return png(64, 64, coloured, chunk(b"tRNS", b"\0"), colour=3)


def repetitive_exif() -> bytes:
    """64 KB of EXIF in which 2,500 tags share a value of 30 KB."""
    count, size = 2_500, 30_000
    tags = (struct.pack("<HHII", tag, 7, size, 30_500) for tag in range(count))
    directory = struct.pack("<H", count) + b"".join(tags)
    return b"Exif\0\0" + (b"II*\0\x08\0\0\0" + directory).ljust(30_500, b"\0") + bytes(size)


def avif_with_exif(image: Image.Image) -> bytes:
    """An AVIF with that EXIF, which Pillow refuses to write."""
    hostile = repetitive_exif()[6:]
    harmless = b"II*\0\x08\0\0\0".ljust(len(hostile), b"\0")
    file = encoded(image, "AVIF", exif=harmless)
    assert harmless in file
    return file.replace(harmless, hostile)


def many_scans(jpeg: bytes, count: int) -> bytes:
    """A progressive JPEG with its last scan repeated."""
    last = jpeg.rindex(b"\xff\xda")
    return jpeg[:last] + jpeg[last:-2] * count + jpeg[-2:]


def good_images() -> Iterator[tuple[str, bytes]]:
    """Unusual files that must be accepted."""
    for mode in ("1", "L", "LA", "P", "RGB", "RGBA"):
        yield f"png-{mode}", encoded(picture(1, mode=mode))
    grey = picture(1, mode="L")
    yield "png-2-bit", encoded(grey.quantize(4), bits=2)
    yield "png-4-bit", encoded(grey.quantize(16), bits=4)
    yield "png-16-bit", encoded(Image.fromarray(np.asarray(grey).astype(np.uint16) * 257))
    yield "jpeg-cmyk", encoded(picture(1, mode="CMYK"), "JPEG")
    yield "jpeg-grey", encoded(grey, "JPEG")
    yield "jpeg-progressive", encoded(picture(1), "JPEG", progressive=True)
    yield "webp-lossless", encoded(picture(1, mode="RGBA"), "WEBP", lossless=True)
    for format in ("AVIF", "BMP", "GIF", "PPM", "TIFF"):
        yield format.lower(), encoded(picture(1), format)
    for mode in ("1", "L", "P", "RGBA", "CMYK"):
        yield f"tiff-{mode}", encoded(picture(1, mode=mode), "TIFF")
    for name in ("tiff_lzw", "tiff_deflate", "tiff_adobe_deflate", "packbits"):
        yield f"tiff-{name}", encoded(picture(1), "TIFF", compression=name)
    yield "gif-comments", gif_comments(encoded(grey, "GIF"), 1000, b"x" * 200)
    yield "gif-transparent", encoded(picture(1).quantize(8), "GIF", transparency=3)
    yield "pgm", encoded(grey, "PPM")
    yield "pbm", encoded(picture(1, mode="1"), "PPM")
    yield "avif-transparent", encoded(picture(1, mode="RGBA"), "AVIF")
    yield "1x1", encoded(picture(1, 1, 1))
    yield "30000x2", encoded(picture(1, 30_000, 2))
    yield "2x30000", encoded(picture(1, 2, 30_000))
    yield "65500x1", encoded(picture(1, 65_500, 1), "JPEG")
    palette = picture(1).quantize(8)
    yield "palette-transparent", encoded(palette, transparency=3)
    yield "png-then-html", encoded(picture(1)) + b"<html><script>alert(1)</script>"
    yield "interlaced", interlaced(np.asarray(grey))
    yield "jpeg-mpo", encoded(picture(1), "MPO", save_all=True, append_images=[picture(2)])
    yield (
        "jpeg-comment",
        encoded(picture(1), "JPEG", comment="ÿ\xff" * 100, icc_profile=b"x" * 70_000),
    )
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter: ignored
    yield "jpeg-turned", encoded(picture(1), "JPEG", exif=exif)


def interlaced(grey: np.ndarray) -> bytes:
    """An interlaced (Adam7) 8-bit grey PNG, which Pillow reads but does not write."""
    passes = (
        (0, 0, 8, 8),
        (0, 4, 8, 8),
        (4, 0, 8, 4),
        (0, 2, 4, 4),
        (2, 0, 4, 2),
        (0, 1, 2, 2),
        (1, 0, 2, 1),
    )
    rows = io.BytesIO()
    for y, x, step_y, step_x in passes:
        for row in grey[y::step_y, x::step_x]:
            rows.write(b"\0" + row.tobytes())
    height, width = grey.shape
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 1)
    data = (
        chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(rows.getvalue()))
        + chunk(b"IEND", b"")
    )
    return b"\x89PNG\r\n\x1a\n" + data

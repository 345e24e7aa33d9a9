"""From the bytes of two image files to two arrays of one size."""

import io
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFile, PngImagePlugin, UnidentifiedImageError

from flownet2 import contract
from gateway.errors import (
    AnimatedImage,
    DamagedImage,
    ImageTooLarge,
    ImageTooSmall,
    NotAnImage,
    SizesDiffer,
    UnsupportedImageFormat,
)

Pixels = npt.NDArray[np.uint8]

GRID = contract.GRID[::-1]
"""Width and height that images are resized to, unless they are inferred at their own size."""

LONGEST = 65_500
"""Most pixels of a side, libjpeg's own limit. Resizing takes time and memory for every pixel of a
side, however few there are on the other, and lets no other thread run meanwhile."""

MAX_TEXT_BYTES = 4 * 2**20
"""Text that the compressed chunks of one PNG may unpack to, all together."""

MAX_SCANS = 100
"""Scans of a JPEG; ten are usual. Each visits all pixels, however few bytes it has."""

MAX_PARTS = 20_000
"""Chunks of a PNG or WebP, segments before a JPEG's pixels. Pillow and libwebp keep something for
each, however short it is. The longest body in the 4 KB chunks of the most careful encoder has
fewer."""

_NATIVE_BYTES_PER_PIXEL = 64
"""Both images, tensors, the flow, and the flow as JSON, per pixel of an image at its own size."""

_RESIZE_BYTES_PER_SIDE = 48
"""Pillow's filter coefficients, per pixel of a side."""

# Of JPEG's markers, by their second byte: start of scan and end of image; fill bytes, stuffing and
# restarts; comments and application segments but for JFIF (0xE0) and Adobe (0xEE).
_SCAN_OR_END = (0xDA, 0xD9)
_WITHOUT_LENGTH = (0xFF, 0x00, 0x01, *range(0xD0, 0xD9))
_METADATA = (*range(0xE1, 0xEE), 0xEF, 0xFE)

_SIXTEEN_TO_EIGHT = ((np.arange(2**16, dtype=np.uint32) + 128) // 257).astype(np.uint8)

# Formats that people try, for a better message than "no image".
_KNOWN = {
    b"\x89PNG\r\n\x1a\n": "PNG",
    b"\xff\xd8\xff": "JPEG",
    b"GIF8": "GIF",
    b"BM": "BMP",
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
    b"\0\0\0\x0cjP  ": "JPEG 2000",
    b"8BPS": "PSD",
    b"P5": "PGM",
    b"P6": "PPM",
    b"%PDF": "PDF",
    b"<svg": "SVG",
}


def configure_pillow(max_pixels: int, formats: list[str]) -> None:
    """Set Pillow's own guards, which are global to the process.

    Its bomb guard warns beyond a number of pixels and refuses beyond twice that number, for WebP
    before it allocates anything; here it refuses beyond `max_pixels`, and never warns.

    Raises:
        ValueError: Pillow reads no such format.
    """
    Image.init()
    unknown = [format for format in formats if format not in Image.OPEN]
    if unknown:
        raise ValueError(
            f"GATEWAY_IMAGE_FORMATS: Pillow has no {', '.join(unknown)}; "
            f"it has {', '.join(sorted(Image.OPEN))}"
        )
    Image.MAX_IMAGE_PIXELS = (max_pixels + 1) // 2
    PngImagePlugin.MAX_TEXT_MEMORY = MAX_TEXT_BYTES
    warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


def open_pair(
    files: Mapping[str, bytes], formats: list[str], max_pixels: int
) -> dict[str, Image.Image]:
    """Open two image files without decoding their pixels: field -> image.

    Formats are recognised by content alone.

    Raises:
        UnsupportedImageFormat, NotAnImage, DamagedImage, AnimatedImage, ImageTooLarge, SizesDiffer.
    """
    images = {field: _open(data, field, formats, max_pixels) for field, data in files.items()}
    (name1, image1), (name2, image2) = images.items()
    if image1.size != image2.size:
        raise SizesDiffer(
            f"{name1} has {image1.width}x{image1.height} pixels and {name2} "
            f"{image2.width}x{image2.height}. Send two images of one size.",
            field=name2,
        )
    return images


def _open(data: bytes, field: str, formats: list[str], max_pixels: int) -> Image.Image:
    too_large = ImageTooLarge(
        f"{field} has more than {max_pixels} pixels. Send a smaller image.", field=field
    )
    try:
        with _decoding(field):
            image = Image.open(io.BytesIO(_without_excess(data)), formats=formats)
            frames = getattr(image, "n_frames", 1)
    except UnidentifiedImageError:
        raise _unidentified(data, field, formats) from None
    except Image.DecompressionBombError:
        raise too_large from None
    if image.width * image.height > max_pixels:
        raise too_large
    if max(image.size) > LONGEST:
        raise ImageTooLarge(
            f"{field} has {image.width}x{image.height} pixels; {LONGEST} a side is the most. "
            "Send a smaller image.",
            field=field,
        )
    if _scans(image) > MAX_SCANS:
        raise _damaged(field, ValueError(f"more than {MAX_SCANS} scans"))
    if frames > 1:
        raise AnimatedImage(
            f"{field} is an animation of {frames} frames. Send one frame.", field=field
        )
    return image


def _without_excess(data: bytes) -> bytes:
    """The file as Pillow may see it: of no more parts than `MAX_PARTS`, a JPEG without metadata.

    Raises:
        ValueError: it has more.
    """
    if data.startswith(b"\xff\xd8"):
        return _without_metadata(data)
    png = data.startswith(b"\x89PNG")
    if not png and not data.startswith(b"RIFF"):
        return data
    offset = 8 if png else 12
    for _ in range(MAX_PARTS):
        if png:
            offset += 12 + int.from_bytes(data[offset : offset + 4])
        else:
            size = int.from_bytes(data[offset + 4 : offset + 8], "little")
            offset += 8 + size + size % 2
        if offset >= len(data):
            return data
    raise ValueError(f"more than {MAX_PARTS} chunks")


def _without_metadata(jpeg: bytes) -> bytes:
    """The JPEG without comments and application segments other than JFIF's and Adobe's, which say
    how to decode it.

    Nothing of the others is used here. Pillow joins the segments of EXIF in quadratic time, logs a
    warning for every tag that it does not like, and takes a file with a directory of further images
    (MPO) for another format.

    Raises:
        ValueError, IndexError: there are too many segments, or no pixels after them.
    """
    kept, offset = [b"\xff\xd8"], 2
    for _ in range(MAX_PARTS):
        offset = jpeg.index(b"\xff", offset)  # decoders skip what stands between segments
        marker = jpeg[offset + 1]
        if marker in _SCAN_OR_END:
            return b"".join((*kept, memoryview(jpeg)[offset:]))
        if marker in _WITHOUT_LENGTH:
            offset += 1
            continue
        end = offset + 2 + int.from_bytes(jpeg[offset + 2 : offset + 4])
        if marker not in _METADATA:
            kept.append(jpeg[offset:end])
        offset = end
    raise ValueError(f"more than {MAX_PARTS} segments before its pixels")


@contextmanager
def _decoding(field: str) -> Iterator[None]:
    """Turn what decoders raise on damaged files, which is about anything, into `DamagedImage`."""
    try:
        yield
    except (MemoryError, UnidentifiedImageError, Image.DecompressionBombError):
        raise
    except Exception as error:
        raise _damaged(field, error) from error


def _scans(image: Image.Image) -> int:
    """Scans of a JPEG; 0 for other formats."""
    if image.format != "JPEG":
        return 0
    assert isinstance(image, ImageFile.ImageFile)
    assert isinstance(image.fp, io.BytesIO)
    return image.fp.getvalue().count(b"\xff\xda")


def _unidentified(
    data: bytes, field: str, formats: list[str]
) -> NotAnImage | DamagedImage | UnsupportedImageFormat:
    name = next((name for magic, name in _KNOWN.items() if data.startswith(magic)), None)
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        name = "WEBP"
    elif data[4:8] == b"ftyp":
        name = "HEIF or AVIF"
    accepted = ", ".join(formats)
    if name is None:
        return NotAnImage(f"{field} is no image. Send one of {accepted}.", field=field)
    if name in formats:
        return _damaged(field, None)
    return UnsupportedImageFormat(
        f"{field} is of the format {name}. Send one of {accepted}.", field=field
    )


def _damaged(field: str, error: Exception | None) -> DamagedImage:
    reason = f" ({str(error)[:80]})" if error and str(error) else ""
    return DamagedImage(
        f"{field} is damaged or incomplete{reason}. Check the file and how it is read.", field=field
    )


def check_native(image: Image.Image, field: str, max_pixels: int) -> None:
    """Make sure that the model takes an image at its own size.

    Raises:
        ImageTooSmall, ImageTooLarge.
    """
    if min(image.size) < contract.MINIMUM_SIDE:
        raise ImageTooSmall(
            f"{field} has {image.width}x{image.height} pixels; {contract.MINIMUM_SIDE} a side is "
            "the least. Leave out size=native.",
            field=field,
        )
    if _padded_area(image) > max_pixels:
        raise ImageTooLarge(
            f"{field} has {image.width}x{image.height} pixels; {max_pixels} is the most at its "
            f"own size, each side rounded up to a multiple of {contract.SIZE_MULTIPLE}. "
            "Leave out size=native, or send a smaller image.",
            field=field,
        )


def _padded_area(image: Image.Image) -> int:
    """Pixels of the image as the networks pad it."""
    return contract.adapted(image.width) * contract.adapted(image.height)


def working_bytes(pair: Mapping[str, Image.Image], native: bool) -> int:
    """Memory that a request takes from decoding to its response, roughly and from above.

    Images that are resized are decoded one after the other.
    """
    return max(_working_bytes(image, native) for image in pair.values())


def _working_bytes(image: Image.Image, native: bool) -> int:
    decoded = image.width * image.height * _bytes_per_pixel(image)
    if native:
        return max(decoded, _padded_area(image) * _NATIVE_BYTES_PER_PIXEL)
    return decoded + sum(image.size) * _RESIZE_BYTES_PER_SIDE


def _bytes_per_pixel(image: Image.Image) -> int:
    """What decoding and resizing take for each pixel, as measured with Pillow 13."""
    if image.format == "WEBP":
        return 16  # libwebp's two canvases, a copy, and the image
    if image.format == "JPEG":
        # libjpeg keeps the coefficients of all components, unless one scan brings everything.
        return 12 if _scans(image) > 1 or "progressive" in image.info else 4
    # Images with alpha are resized as a copy multiplied by it; deeper ones are made 8-bit.
    return 4 if image.mode in ("1", "L", "P", "RGB") else 8


def load(image: Image.Image, field: str) -> Image.Image:
    """Decode an image's pixels; 16-bit grey becomes 8-bit grey.

    EXIF orientation is ignored, as in the service that this one replaces.

    Raises:
        DamagedImage: the pixels cannot be decoded.
    """
    with _decoding(field):
        image.load()
    if image.mode.startswith("I;16"):
        return Image.fromarray(_SIXTEEN_TO_EIGHT[np.asarray(image)])
    return image


def to_rgb(image: Image.Image, field: str, native: bool) -> Pixels:
    """The image as the model takes it: uint8 RGB, [512, 512, 3] or at its own size.

    First resized in its own mode (Pillow takes the nearest pixel for palettes and 1-bit images),
    then converted, as in the service that this one replaces.

    Raises:
        DamagedImage: the pixels have no colours: their palette is missing.
    """
    with _decoding(field):
        resized = image if native else image.resize(GRID, Image.Resampling.LANCZOS)
        return np.asarray(resized.convert("RGB"))

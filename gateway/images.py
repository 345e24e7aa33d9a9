"""Decoding of two image files to two uint8 RGB arrays of one size."""

import io
import re
import struct
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt
from PIL import AvifImagePlugin, Image, PngImagePlugin, UnidentifiedImageError

from flownet2 import contract
from gateway import guards
from gateway.errors import (
    AnimatedImage,
    DamagedImage,
    ImageTooLarge,
    ImageTooSmall,
    NotAnImage,
    SizesDiffer,
    UnsupportedImageFormat,
)
from gateway.system import silence_libtiff

Pixels = npt.NDArray[np.uint8]

GRID = contract.GRID[::-1]
"""Width and height that images are resized to without `size=native`."""

MAX_TEXT_BYTES = 4 * 2**20
"""Most bytes that the compressed text chunks of one PNG may expand to, all together."""

_NATIVE_BYTES_PER_PIXEL = 64
"""Memory of both images, tensors, the flow, and the flow as JSON, per pixel of one image."""

_RESIZE_BYTES_PER_SIDE = 48
"""Memory of Pillow's filter coefficients, per pixel of a side."""

_BITS_PER_SAMPLE = 258
"""TIFF's tag."""

# First bytes -> format. Formats that are not accepted are here for a better message than "not an
# image".
_FORMATS = {
    b"\x89PNG\r\n\x1a\n": "PNG",
    b"\xff\xd8\xff": "JPEG",
    b"GIF8": "GIF",
    b"BM": "BMP",
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
    b"II+\0": "BigTIFF",
    b"MM\0+": "BigTIFF",
    **{f"P{digit}".encode(): "PPM" for digit in range(1, 7)},
    b"\0\0\0\x0cjP  ": "JPEG 2000",
    b"\0\0\0\x0cJXL ": "JPEG XL",
    b"\xff\x0a": "JPEG XL",
    b"8BPS": "PSD",
    b"v/1\x01": "OpenEXR",
    b"\x93NUMPY": "NumPy .npy",
    b"%PDF": "PDF",
    b"<svg": "SVG",
}
_IN_BASE64 = (b"iVBORw0KGgo", b"/9j/", b"UklGR", b"data:image/")


def configure_pillow(max_pixels: int, formats: list[str]) -> None:
    """Set Pillow's own limits, which are global to the process.

    Its check against decompression bombs warns above a number of pixels and refuses above twice
    that number, for WebP before it allocates memory. Here it refuses above `max_pixels` and never
    warns.

    Raises:
        ValueError: Pillow does not read one of the formats.
    """
    Image.init()
    unknown = [format for format in formats if format not in Image.OPEN]
    if unknown:
        raise ValueError(
            f"GATEWAY_IMAGE_FORMATS: Pillow does not read {', '.join(unknown)}; "
            f"it reads {', '.join(sorted(Image.OPEN))}"
        )
    Image.MAX_IMAGE_PIXELS = (max_pixels + 1) // 2
    silence_libtiff()
    PngImagePlugin.MAX_TEXT_MEMORY = MAX_TEXT_BYTES
    AvifImagePlugin.DEFAULT_MAX_THREADS = 1  # requests already run in parallel
    warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


def open_pair(
    files: Mapping[str, bytes], formats: list[str], max_pixels: int
) -> dict[str, Image.Image]:
    """Open two image files without decoding their pixels, and return the images by field.

    The content alone decides what format a file has.

    Raises:
        UnsupportedImageFormat, NotAnImage, DamagedImage, AnimatedImage, ImageTooLarge, SizesDiffer.
    """
    images = {field: _open(data, field, formats, max_pixels) for field, data in files.items()}
    (name1, image1), (name2, image2) = images.items()
    if image1.size != image2.size:
        raise SizesDiffer(
            f"{name1} has {image1.width}x{image1.height} pixels and {name2} "
            f"{image2.width}x{image2.height}. Send two images of the same size.",
            field=name2,
        )
    return images


def _open(data: bytes, field: str, formats: list[str], max_pixels: int) -> Image.Image:
    name, accepted = _format_of(data), f"Send one of {', '.join(formats)}."
    if name is not None and name not in formats:
        raise UnsupportedImageFormat(f"{field} is {name}. {accepted}", field=field)
    too_large = ImageTooLarge(
        f"{field} has more than {max_pixels} pixels. Send a smaller image.", field=field
    )
    try:
        with _decoding(field):
            image = Image.open(io.BytesIO(guards.sanitise(data)), formats=formats)
            frames = getattr(image, "n_frames", 1)
            guards.check_decoding(image)
    except UnidentifiedImageError:
        if name is None:
            raise _not_an_image(data, field, accepted) from None
        raise _damaged(field, None) from None
    except Image.DecompressionBombError:
        raise too_large from None
    if image.width * image.height > max_pixels:
        raise too_large
    if max(image.size) > guards.MAX_SIDE:
        raise ImageTooLarge(
            f"{field} has {image.width}x{image.height} pixels; a side may have at most "
            f"{guards.MAX_SIDE}. Send a smaller image.",
            field=field,
        )
    if frames > 1:
        raise _several_frames(field)
    if image.mode == "I" and image.format != "PPM":
        raise UnsupportedImageFormat(
            f"{field} has 32-bit integers, whose values for black and white are not known. "
            "Convert it to 8 or 16 bits.",
            field=field,
        )
    return image


def _format_of(data: bytes) -> str | None:
    """Return the name of a file's format by its first bytes, or None for an unknown one."""
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    if data[4:8] == b"ftyp":
        return "AVIF" if b"avi" in data[8:64] else "HEIF or a video"
    return next((name for start, name in _FORMATS.items() if data.startswith(start)), None)


def _not_an_image(data: bytes, field: str, accepted: str) -> NotAnImage:
    if data.startswith(_IN_BASE64):
        accepted = (
            "It holds base64 where the bytes of the image should be: encode them once in JSON, and "
            "not at all in a form."
        )
    return NotAnImage(f"{field} is not an image. {accepted}", field=field)


@contextmanager
def _decoding(field: str) -> Iterator[None]:
    """Turn the many exceptions that decoders raise for damaged files into `DamagedImage`."""
    try:
        yield
    except (MemoryError, UnidentifiedImageError, Image.DecompressionBombError):
        raise
    except guards.SeveralFrames:
        raise _several_frames(field) from None
    except guards.UnsupportedVariant as error:
        raise UnsupportedImageFormat(
            f"{field} is {error}, which is not supported. Save it as PNG.", field=field
        ) from None
    except Exception as error:
        raise _damaged(field, error) from error


def _several_frames(field: str) -> AnimatedImage:
    return AnimatedImage(f"{field} has several frames or pages. Send one frame.", field=field)


def _damaged(field: str, error: Exception | None) -> DamagedImage:
    # Errors of indexing say nothing about the file.
    shown = None if isinstance(error, LookupError | struct.error) else error
    text = re.sub(r"<[^<>]* at 0x[0-9a-f]+>", "the file", str(shown or ""))[:80]
    reason = f" ({text})" if text else ""
    return DamagedImage(
        f"{field} is damaged or incomplete{reason}. Check the file and how it is read.", field=field
    )


def check_native(image: Image.Image, field: str, max_pixels: int) -> None:
    """Check that the model accepts an image at its own size.

    Raises:
        ImageTooSmall, ImageTooLarge.
    """
    if min(image.size) < contract.MINIMUM_SIDE:
        raise ImageTooSmall(
            f"{field} has {image.width}x{image.height} pixels; the least is "
            f"{contract.MINIMUM_SIDE} a side. Leave out size=native, or send a larger image.",
            field=field,
        )
    if padded_area(*image.size) > max_pixels:
        raise ImageTooLarge(
            f"{field} has {image.width}x{image.height} pixels; at its own size the most is "
            f"{max_pixels}, each side rounded up to a multiple of {contract.SIZE_MULTIPLE}. "
            "Leave out size=native, or send a smaller image.",
            field=field,
        )


def padded_area(width: int, height: int) -> int:
    """Return the pixels of an image with its sides rounded up as the networks do."""
    return contract.adapted(width) * contract.adapted(height)


def working_bytes(pair: Mapping[str, Image.Image], native: bool) -> int:
    """Return an upper estimate of the memory that a request needs from decoding to its response.

    Images that are resized are decoded one after the other.
    """
    return max(_working_bytes(image, native) for image in pair.values())


def _working_bytes(image: Image.Image, native: bool) -> int:
    decoded = image.width * image.height * _bytes_per_pixel(image)
    if native:
        return max(decoded, padded_area(*image.size) * _NATIVE_BYTES_PER_PIXEL)
    return decoded + sum(image.size) * _RESIZE_BYTES_PER_SIDE


def _bytes_per_pixel(image: Image.Image) -> int:
    """Return the memory of decoding and resizing per pixel, measured with Pillow 13."""
    if image.format in ("WEBP", "AVIF"):
        return 16  # canvases of the decoder, a copy, and the image
    if image.format == "JPEG":
        # libjpeg keeps the coefficients of all components, unless there is a single scan.
        return 12 if guards.scans(image) > 1 or "progressive" in image.info else 4
    if image.mode in ("I", "F"):
        return 16
    pixel = 2 if image.mode in ("1", "L", "P") else 4
    # Images with alpha are resized as a premultiplied copy, deep ones are converted to 8 bits, and
    # a TIFF may be a single strip, which libtiff decodes as a whole.
    simple = image.mode in ("1", "L", "P", "RGB") and image.format != "TIFF"
    return pixel if simple else 2 * pixel


def load(image: Image.Image, field: str) -> Image.Image:
    """Decode an image's pixels, and scale deep ones to 8 bits by the range of their type.

    The range of floats is 0 to 1. EXIF orientation is ignored, as in the FlowNet2 Docker image's
    service.

    Raises:
        DamagedImage: the pixels cannot be decoded.
        UnsupportedImageFormat: there are floats outside of 0 to 1.
    """
    with _decoding(field):
        image.load()
    if image.mode.startswith("I"):
        bits = getattr(image, "tag_v2", {}).get(_BITS_PER_SAMPLE, (16,))[0]
        values = np.asarray(image)
        return Image.fromarray(_to_8_bits(bits)[values.astype(np.uint16, copy=False)])
    if image.mode == "F":
        floats = np.asarray(image)
        if not (floats.min() >= 0 and floats.max() <= 1):  # NaN is neither
            raise UnsupportedImageFormat(
                f"{field} has floats outside of the range from 0 (black) to 1 (white). Scale it.",
                field=field,
            )
        return Image.fromarray((floats * np.float32(255) + np.float32(0.5)).astype(np.uint8))
    return image


def _to_8_bits(bits: int) -> npt.NDArray[np.uint8]:
    """Return the table that scales values of 9 to 16 bits to 8 bits."""
    largest = 2**bits - 1
    values = np.minimum(np.arange(2**16), largest)
    table: npt.NDArray[np.uint8] = ((values * 255 + largest // 2) // largest).astype(np.uint8)
    return table


def to_rgb(image: Image.Image, field: str, native: bool) -> Pixels:
    """Convert an image to the model's input: uint8 RGB, [512, 512, 3] or at its own size.

    It is resized in its own mode (Pillow takes the nearest pixel for palettes and 1-bit images) and
    then converted, as in the FlowNet2 Docker image's service.

    Raises:
        DamagedImage: the pixels are indices into a palette that is missing.
    """
    with _decoding(field):
        resized = image if native else image.resize(GRID, Image.Resampling.LANCZOS)
        return np.asarray(resized.convert("RGB"))

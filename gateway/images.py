"""From the bytes of two image files to two arrays of one size."""

import io
import warnings
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
from PIL import Image, PngImagePlugin, UnidentifiedImageError

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

GRID = (512, 512)
"""Width and height that images are resized to, unless they are inferred at their own size."""

SMALLEST = 16
"""Fewest pixels of a side that the model takes."""

MAX_TEXT_BYTES = 4 * 2**20
"""Text that the compressed chunks of one PNG may unpack to, all together."""

# Pillow keeps 1 to 4 bytes a pixel; libwebp two canvases of 4 more.
_BYTES_PER_PIXEL = {"WEBP": 12}
_NATIVE_BYTES_PER_PIXEL = 64
"""Both images, tensors, the flow, and the flow as JSON, per pixel of an image at its own size."""

_SIXTEEN_TO_EIGHT = ((np.arange(2**16, dtype=np.uint32) + 128) // 257).astype(np.uint8)

# Formats that people try, for a better answer than "no image".
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
    unknown = [form for form in formats if form not in Image.OPEN]
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
        image = Image.open(io.BytesIO(data), formats=formats)
        frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
    except UnidentifiedImageError:
        raise _unidentified(data, field, formats) from None
    except Image.DecompressionBombError:
        raise too_large from None
    except MemoryError:
        raise
    except Exception as error:  # decoders fail in many ways on bytes made to make them fail
        raise _damaged(field, error) from error
    if image.width * image.height > max_pixels:
        raise too_large
    if frames > 1:
        raise AnimatedImage(
            f"{field} is an animation of {frames} frames. Send one frame.", field=field
        )
    return image


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
    if min(image.size) < SMALLEST:
        raise ImageTooSmall(
            f"{field} has {image.width}x{image.height} pixels; {SMALLEST} a side is the least. "
            "Leave out size=native.",
            field=field,
        )
    if image.width * image.height > max_pixels:
        raise ImageTooLarge(
            f"{field} has {image.width}x{image.height} pixels; {max_pixels} is the most at its "
            "own size. Leave out size=native, or send a smaller image.",
            field=field,
        )


def working_bytes(pair: Mapping[str, Image.Image], native: bool) -> int:
    """Memory that a request takes from decoding to its answer, roughly and from above.

    Images that are resized are decoded one after the other.
    """
    sizes = [
        image.width
        * image.height
        * max(_BYTES_PER_PIXEL.get(image.format or "", 4), _NATIVE_BYTES_PER_PIXEL if native else 0)
        for image in pair.values()
    ]
    return max(sizes)


def load(image: Image.Image, field: str) -> Image.Image:
    """Decode an image's pixels; 16-bit grey becomes 8-bit grey.

    EXIF orientation is ignored, as in the service that this one replaces.

    Raises:
        DamagedImage: the pixels cannot be decoded.
    """
    try:
        image.load()
    except MemoryError:
        raise
    except Exception as error:
        raise _damaged(field, error) from error
    if image.mode.startswith("I;16"):
        return Image.fromarray(_SIXTEEN_TO_EIGHT[np.asarray(image)])
    return image


def to_rgb(image: Image.Image, native: bool) -> Pixels:
    """The image as the model takes it: uint8 RGB, [512, 512, 3] or at its own size.

    First resized in its own mode (Pillow takes the nearest pixel for palettes and 1-bit images),
    then converted, as in the service that this one replaces.
    """
    resized = image if native else image.resize(GRID, Image.Resampling.LANCZOS)
    return np.asarray(resized.convert("RGB"))

"""Input images from many kinds of sources, as files for a gateway or as pixels for Triton."""

import contextlib
import io
import os
import threading
from collections.abc import Callable, Iterator
from typing import IO, Any

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from flownet2 import png, storage
from flownet2.errors import Error

Pixels = npt.NDArray[np.uint8]
Source = (
    str
    | os.PathLike[str]
    | bytes
    | bytearray
    | memoryview
    | IO[bytes]
    | Image.Image
    | npt.NDArray[np.uint8]
    | Callable[[], Pixels]
)

_SENT_UNCHANGED = ("PNG", "JPEG", "WEBP")
_PNG_BIT_DEPTH = 24  # offset in bytes
_FULL_RANGE_FORMATS = ("PNG", "PPM", "JPEG2000", "TIFF", None)
"""Formats (Pillow's names) whose 16-bit values use the whole range; None: not from a file."""
_TIFF_BITS_PER_SAMPLE = 258


class ImageError(Error):
    """An image cannot be read or decoded; the message names it."""


class Frame:
    """An image that is read when it is first needed, and converted once for all of its pairs.

    Any number of threads may use a frame.
    """

    def __init__(self, source: Source, name: str = "image") -> None:
        """Take an image.

        Args:
            source: a path, a URL that fsspec reads, the bytes of an image file, a file opened in
                binary mode, a Pillow image, uint8 RGB `[H, W, 3]` (an array, or a tensor in the
                CPU's memory), or a function that returns such an array.
            name: name of the image in messages, which add its path.

        Raises:
            ImageError: `source` is none of these.
        """
        self._file: bytes | None = None
        self._sent: bytes | None = None
        self._pixels: Pixels | None = None
        self._path: str | None = None
        self._convert: Callable[[], Pixels] | None = None
        self._lock = threading.RLock()
        self._name = name
        with self._reading():
            self._take(source)

    def _take(self, source: Any) -> None:
        if isinstance(source, bytes | bytearray | memoryview):
            self._file = bytes(source)
        elif isinstance(source, str | os.PathLike):
            self._path = os.fsdecode(source)
            if self._path != self._name:
                self._name = f"{self._name} ({self._path})"
        elif isinstance(source, Image.Image):
            self._pixels = to_rgb(source, self._name)
        elif hasattr(source, "__array__"):
            self._pixels = self._checked(np.asarray(source))
        elif hasattr(source, "read"):
            content = source.read()
            if not isinstance(content, bytes):
                raise ImageError(f"{self._name} is a file opened in text mode: open it with 'rb'")
            self._file = content
        elif callable(source):
            self._convert = source
        else:
            raise ImageError(
                f"{self._name} is of type {type(source).__name__}: give a path, bytes, a binary "
                "file, a Pillow image or a uint8 array"
            )

    def _checked(self, array: npt.NDArray[Any]) -> Pixels:
        if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3:
            raise ImageError(
                f"{self._name} is an array of {array.dtype} {list(array.shape)}: convert it to "
                "uint8 RGB [height, width, 3]"
            )
        return array

    def pixels(self) -> Pixels:
        """Return the image as uint8 RGB `[H, W, 3]`.

        Raises:
            ImageError: it cannot be read.
        """
        with self._lock, self._reading():
            if self._pixels is None and self._convert is not None:
                self._pixels, self._convert = self._checked(self._convert()), None
            elif self._pixels is None:
                with self._open() as image:
                    self._pixels = to_rgb(image, self._name)
            return self._pixels

    def file(self) -> bytes:
        """Return the image as a file that a gateway takes and decodes to the same pixels.

        Raises:
            ImageError: it cannot be read.
        """
        with self._lock, self._reading():
            if self._sent is None:
                # Not compressed: the flow in the response is larger than both images anyway.
                self._sent = self._unchanged() or png.encode(self.pixels(), compressed=False)
            return self._sent

    def _unchanged(self) -> bytes | None:
        """Return the file itself if a gateway takes it, else None."""
        if self._convert is not None or self._pixels is not None:
            return None
        with self._open() as image:
            deep = image.format == "PNG" and self._read()[_PNG_BIT_DEPTH] > 8
            return self._read() if image.format in _SENT_UNCHANGED and not deep else None

    def size(self) -> tuple[int, int]:
        """Return width and height; image files are not decoded for it.

        Raises:
            ImageError: the image cannot be read.
        """
        with self._lock, self._reading():
            if self._convert is not None or self._pixels is not None:
                height, width, _ = self.pixels().shape
                return width, height
            with self._open() as image:
                return image.size

    def _open(self) -> Image.Image:
        image = Image.open(io.BytesIO(self._read()))
        # Additional frames are previews in cameras' MPO files, and layers in PSD files.
        if image.format not in ("MPO", "PSD") and getattr(image, "is_animated", False):
            raise ImageError(f"{self._name} has several frames: give each as a separate image")
        return image

    def _read(self) -> bytes:
        if self._file is None:
            assert self._path is not None
            self._file = storage.read(self._path)
        return self._file

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        """Convert every error of Pillow, NumPy and file systems to ImageError."""
        try:
            yield
        except ImageError:
            raise
        except FileNotFoundError as error:
            raise ImageError(f"{self._name} does not exist") from error
        except UnidentifiedImageError as error:  # its message shows an object's address
            raise ImageError(
                f"{self._name} is not an image of a format that Pillow reads"
            ) from error
        except Exception as error:
            raise ImageError(f"{self._name} cannot be read as an image: {error}") from error


def to_rgb(image: Image.Image, name: str = "image") -> Pixels:
    """Convert a Pillow image to uint8 RGB `[H, W, 3]`.

    Deeper images are scaled: 16-bit ones from the range of their format, floats from 0 to 1.
    Alpha is dropped.

    Args:
        image: an image of any mode.
        name: name of the image in messages.

    Raises:
        ImageError: it has floats outside of 0 to 1, or deep integers whose range is not known.
    """
    if image.mode == "F" or image.mode.startswith("I"):
        image = Image.fromarray(_to_8_bits(image, name))
    return np.asarray(image.convert("RGB"))


def _to_8_bits(image: Image.Image, name: str) -> Pixels:
    values = np.asarray(image)
    if image.mode == "F":
        low, high = values.min(), values.max()
        if not (low >= 0 and high <= 1):  # also rejects NaN
            raise ImageError(f"{name} has floats from {low:g} to {high:g}: scale them to 0 to 1")
        limit = 1
    elif image.mode.startswith("I;16") and image.format in _FULL_RANGE_FORMATS:
        tags: Any = getattr(image, "tag_v2", {})
        (bits,) = tags.get(_TIFF_BITS_PER_SAMPLE, (16,))
        limit = 2**bits - 1
    elif image.mode == "I" and image.format == "PPM":  # Pillow scales it to 16 bits
        limit = 2**16 - 1
    else:
        raise ImageError(
            f"{name} has integers of an unknown range (Pillow's mode {image.mode}): convert it to "
            "8 or unsigned 16 bits"
        )
    scaled: Pixels = np.rint(values * (255 / limit)).astype(np.uint8)
    return scaled


def shrunk(pixels: Pixels, longest: int) -> Pixels:
    """Return uint8 RGB `[H, W, 3]` with its longer edge reduced to at most `longest` pixels."""
    height, width, _ = pixels.shape
    scale = longest / max(height, width)
    if scale >= 1:
        return pixels
    size = max(1, round(width * scale)), max(1, round(height * scale))
    return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.LANCZOS))

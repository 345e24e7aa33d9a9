"""Images on their way to a server: as files or as pixels, whichever it takes."""

import contextlib
import io
import os
import threading
from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt
from PIL import Image

from flownet2 import storage
from flownet2.errors import Error

Pixels = npt.NDArray[np.uint8]
Source = str | os.PathLike[str] | bytes | Image.Image | Pixels | Callable[[], Pixels]

_SENT_AS_THEY_ARE = (b"\x89PNG", b"\xff\xd8\xff", b"RIFF")  # what a gateway takes: PNG, JPEG, WebP


class ImageError(Error):
    """An image that cannot be read or decoded; the message names it."""


class Frame:
    """One image, read when it is first needed, and converted once for all of its pairs.

    Any number of threads may ask it.
    """

    def __init__(self, source: Source, name: str = "image") -> None:
        """Take a path, a URL, an image file's bytes, a Pillow image, uint8 RGB `[H, W, 3]`, or a
        function that gives the last.

        Args:
            name: what messages call it, with its path if it has one.
        """
        self._file: bytes | None = None
        self._pixels: Pixels | None = None
        self._path: str | None = None
        self._convert: Callable[[], Pixels] | None = None
        self._lock = threading.RLock()
        self._name = name
        if isinstance(source, bytes):
            self._file = source
        elif isinstance(source, Image.Image):
            with self._reading():
                self._pixels = to_rgb(source)
        elif isinstance(source, np.ndarray):
            if source.dtype != np.uint8 or source.ndim != 3 or source.shape[2] != 3:
                raise ImageError(
                    f"{name} is {source.dtype} {list(source.shape)}, not uint8 [height, width, 3]"
                )
            self._pixels = source
        elif callable(source):
            self._convert = source
        else:
            self._path = os.fspath(source)
            self._name = f"{name} ({self._path})" if name != self._path else name

    def pixels(self) -> Pixels:
        """The image as uint8 RGB `[H, W, 3]`; ImageError where it cannot be had."""
        with self._lock, self._reading():
            if self._pixels is None and self._convert is not None:
                self._pixels, self._convert = self._convert(), None
            elif self._pixels is None:
                with Image.open(io.BytesIO(self._read())) as image:
                    self._pixels = to_rgb(image)
            return self._pixels

    def file(self) -> bytes:
        """The image as a file that a gateway takes; ImageError where it cannot be had."""
        with self._lock:
            if self._file is None and self._path is not None:
                with self._reading():
                    self._read()
            if self._file is None or not self._file.startswith(_SENT_AS_THEY_ARE):
                file = io.BytesIO()
                # Not compressed: the flow that comes back is larger than both images.
                Image.fromarray(self.pixels()).save(file, "PNG", compress_level=0)
                self._file = file.getvalue()
            return self._file

    def size(self) -> tuple[int, int]:
        """Width and height, without decoding; ImageError where they cannot be had."""
        with self._lock, self._reading():
            if self._convert is not None or self._pixels is not None:
                height, width, _ = self.pixels().shape
                return width, height
            with Image.open(io.BytesIO(self._read())) as image:
                return image.size

    def _read(self) -> bytes:
        if self._file is None:
            assert self._path is not None
            self._file = storage.read(self._path)
        return self._file

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        """Turn what Pillow raises on damaged files, which is about anything, into ImageError."""
        try:
            yield
        except ImageError:
            raise
        except FileNotFoundError as error:
            raise ImageError(f"{self._name} does not exist") from error
        except Exception as error:
            raise ImageError(f"{self._name} cannot be read as an image: {error}") from error


def to_rgb(image: Image.Image) -> Pixels:
    """A Pillow image as uint8 RGB `[H, W, 3]`; 16-bit grey is scaled, alpha dropped."""
    if image.mode.startswith("I;16"):
        deep = np.asarray(image).astype(np.uint32)
        image = Image.fromarray(((deep + 128) // 257).astype(np.uint8))
    return np.asarray(image.convert("RGB"))


def shrunk(pixels: Pixels, longest: int) -> Pixels:
    """The image with its longer edge reduced to `longest` pixels, if it is longer than that."""
    height, width, _ = pixels.shape
    scale = longest / max(height, width)
    if scale >= 1:
        return pixels
    size = max(1, round(width * scale)), max(1, round(height * scale))
    return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.LANCZOS))

"""Settings of the C library that decodes TIFF."""

import ctypes
from pathlib import Path


def silence_libtiff() -> None:
    """Stop the libtiff that Pillow has loaded from writing to standard error, which is the log.

    Pillow raises an exception for the same faults.
    """
    for line in Path("/proc/self/maps").read_text().splitlines():
        path = line.partition("/")[2]
        if "libtiff" in path:
            library = ctypes.CDLL(f"/{path}")
            library.TIFFSetErrorHandler(None)
            library.TIFFSetWarningHandler(None)
            return

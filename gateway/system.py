"""Settings of C libraries."""

import contextlib
import ctypes
from pathlib import Path

from gateway.settings import MIB


def tune_malloc() -> None:
    """Make glibc's malloc share and keep memory.

    Two heaps, instead of one of 64 MiB for each thread, halve the memory of the process under load.
    Freed megabytes are kept for the next request: new pages cost up to 20 ms a request.
    """
    m_trim_threshold, m_mmap_threshold, m_arena_max = -1, -3, -8
    with contextlib.suppress(AttributeError):  # other C libraries
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(m_arena_max, 2)
        mallopt(m_trim_threshold, 128 * MIB)
        mallopt(m_mmap_threshold, 32 * MIB)


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

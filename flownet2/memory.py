"""Settings of the C library's memory allocator."""

import contextlib
import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8  # parameters of glibc's mallopt


def keep_freed_memory() -> None:
    """Have glibc reuse freed memory of up to 128 MiB, in two heaps for all threads.

    By default it returns images and flows to the system and gets new pages for the next ones, one
    page fault each: several milliseconds for a pair of 512x512, up to 20 ms for a large request. A
    heap for each thread would double the memory of a busy process.
    """
    with contextlib.suppress(AttributeError):  # other C libraries
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_ARENA_MAX, 2)
        mallopt(_M_TRIM_THRESHOLD, 2**27)
        mallopt(_M_MMAP_THRESHOLD, 2**25)  # the largest value that it accepts

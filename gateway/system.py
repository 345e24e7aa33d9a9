"""What the gateway asks of the C library."""

import contextlib
import ctypes

from gateway.settings import MIB


def tune_malloc() -> None:
    """Have glibc keep two heaps, not one of 64 MiB for each thread: what one thread has freed,
    another can use, and the process needs half of the memory under load. And have it keep the
    megabytes that a request frees for the next one: a system's pages cost up to 20 ms a request."""
    m_trim_threshold, m_mmap_threshold, m_arena_max = -1, -3, -8
    with contextlib.suppress(AttributeError):  # other C libraries
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(m_arena_max, 2)
        mallopt(m_trim_threshold, 128 * MIB)
        mallopt(m_mmap_threshold, 32 * MIB)

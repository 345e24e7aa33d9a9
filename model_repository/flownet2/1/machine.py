"""CPU features, cores and memory of this machine, or of its container."""

import contextlib
import math
import os
from pathlib import Path


def has_bfloat16() -> bool:
    """Return True if the CPU has bfloat16 arithmetic; without it OpenVINO would emulate it."""
    return not {"avx512_bf16", "amx_bf16"}.isdisjoint(_cpu_flags())


def has_amx() -> bool:
    """Return True if the CPU multiplies matrices of bfloat16."""
    return "amx_bf16" in _cpu_flags()


def available_cores() -> int:
    """Count the cores that this process may use, by its affinity and its container's quota."""
    cores = len(os.sched_getaffinity(0))
    with contextlib.suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
        cores = min(cores, math.ceil(int(quota) / int(period)))  # ValueError: "max", no quota
    return max(cores, 1)


def available_memory() -> int:
    """Return the bytes of memory that this process may use: the machine's, or its container's."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with contextlib.suppress(OSError, ValueError):  # ValueError: "max", no limit
        memory = min(memory, int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii")))
    return memory


def _cpu_flags() -> list[str]:
    return Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").split()

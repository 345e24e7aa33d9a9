"""Process groups, for tests."""

import contextlib
import os

import psutil


def processes_of_group(group: int) -> dict[str, int]:
    """Return the process ids of a process group by name, without zombies."""
    found = {}
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
            if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                found[process.name()] = process.pid
    return found

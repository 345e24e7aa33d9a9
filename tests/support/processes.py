"""Processes that tests look at."""

import contextlib
import os

import psutil


def processes_of_group(group: int) -> dict[str, int]:
    """Processes, zombies apart, of a process group: name -> process id."""
    found = {}
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
            if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                found[process.name()] = process.pid
    return found

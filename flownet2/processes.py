"""Child processes that end with their parent."""

import contextlib
import ctypes
import multiprocessing
import os
import signal
from collections.abc import Sequence
from pathlib import Path

_PR_SET_PDEATHSIG = 1


def end_with_parent() -> None:
    """Have the kernel send SIGTERM to this process when its parent exits (Linux only).

    A parent that exited before the call is not noticed: check :func:`is_orphan` afterwards.
    """
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def is_orphan() -> bool:
    """Return True if the process that started this one with `multiprocessing` has exited."""
    parent = multiprocessing.parent_process()
    return parent is None or os.getppid() != parent.pid


def ending_with_parent(command: Sequence[str | Path]) -> list[str]:
    """Return a command line that runs `command` until this process exits, at the latest.

    The kernel sends SIGTERM to the command when the thread that started it ends, so start it from a
    thread that outlives the command. `setpriv` is part of util-linux, which every Linux has.
    """
    return ["/usr/bin/setpriv", "--pdeathsig", "TERM", "--", *map(str, command)]

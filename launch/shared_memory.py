"""Names for shared memory regions that do not outlive their owner for long.

Triton's Python backend keeps tensors in `/dev/shm`, and a crash leaves them there.
"""

import contextlib
import fcntl
import secrets
from collections.abc import Iterator
from pathlib import Path

FOLDER = Path("/dev/shm")  # noqa: S108
PREFIX = "flownet2-"
LOCK = ".lock"


@contextlib.contextmanager
def region_names() -> Iterator[tuple[str, int]]:
    """A prefix for the names of regions, which are removed when the block ends.

    Those of earlier blocks whose processes were killed are removed when it begins. A lock says
    whether an owner still lives, also one in another container that shares the folder.

    Yields:
        The prefix, and a file descriptor for the owner's processes to inherit: it holds the lock.
    """
    for lock in FOLDER.glob(f"{PREFIX}*{LOCK}"):
        with contextlib.suppress(OSError), lock.open("rb") as file:  # another user's, or in use
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _remove(lock)
    new = FOLDER / f"{PREFIX}{secrets.token_hex(8)}"
    with new.open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        lock = new.rename(new.with_suffix(LOCK))  # named when it is locked, or it could be taken
        try:
            yield f"{lock.stem}-", file.fileno()
        finally:
            _remove(lock)


def _remove(lock: Path) -> None:
    for region in FOLDER.glob(f"{lock.stem}-*"):
        region.unlink(missing_ok=True)
    lock.unlink(missing_ok=True)

"""Names for the shared memory regions of Triton's Python backend, and their removal.

The backend keeps tensors in `/dev/shm`, and leaves them there if it crashes.
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
    """Reserve a prefix for the names of regions, and remove the regions when the block ends.

    Regions of killed processes are removed when it begins. A locked file shows that their owner is
    alive, even one in another container that shares the folder.

    Yields:
        The prefix, and the locked file's descriptor, for the owner's processes to inherit.
    """
    for lock in FOLDER.glob(f"{PREFIX}*{LOCK}"):
        with contextlib.suppress(OSError), lock.open("rb") as file:  # not ours, or locked
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _remove(lock)
    new = FOLDER / f"{PREFIX}{secrets.token_hex(8)}"
    with new.open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        lock = new.rename(new.with_suffix(LOCK))  # locked first, so nobody removes it
        try:
            yield f"{lock.stem}-", file.fileno()
        finally:
            _remove(lock)


def _remove(lock: Path) -> None:
    for region in FOLDER.glob(f"{lock.stem}-*"):
        region.unlink(missing_ok=True)
    lock.unlink(missing_ok=True)

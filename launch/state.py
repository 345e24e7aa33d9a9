"""The files of a running service: its log, and the process id that `make reload` signals."""

import contextlib
import fcntl
import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from launch.errors import LaunchError
from launch.ports import port_from_environment

BUILD = Path(__file__).parent.parent / "build"


def folder() -> Path:
    """Return the folder for log and process id, after creating it.

    LOG_DIR names it. The default is `build/` of the checkout or, if that is read-only, a temporary
    folder of this user.

    Raises:
        LaunchError: LOG_DIR is not writable, or another user owns the temporary folder.
    """
    if chosen := os.environ.get("LOG_DIR"):
        if not _is_writable(Path(chosen)):
            raise LaunchError(f"LOG_DIR={chosen} is not writable: name another folder")
        return Path(chosen)
    if _is_writable(BUILD):
        return BUILD
    temporary = Path(tempfile.gettempdir()) / f"flownet2-{os.getuid()}"
    if not _is_writable(temporary) or temporary.lstat().st_uid != os.getuid():
        raise LaunchError(f"neither {BUILD} nor {temporary} is writable: set LOG_DIR to a folder")
    return temporary


def _is_writable(path: Path) -> bool:
    try:
        path.mkdir(mode=0o755, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            return True
    except OSError:
        return False


@contextlib.contextmanager
def announced(port: int) -> Iterator[None]:
    """Keep this process's id in a locked file while the block runs, for `send_reload`."""
    with (folder() / f"serve-{port}.pid").open("a+") as file:
        # Do not wait for the lock: a second process for the same port fails when it binds the port.
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
        yield


def send_reload(port: int) -> None:
    """Have the service on `port` load its models again.

    Raises:
        LaunchError: no service of this checkout runs there.
    """
    file = folder() / f"serve-{port}.pid"
    try:
        with file.open() as opened:
            # A running service holds the lock, so a file that can be locked is left from an earlier
            # one.
            try:
                fcntl.flock(opened, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                os.kill(int(opened.read()), signal.SIGUSR1)
                return
    except (OSError, ValueError):
        pass
    raise LaunchError(
        f"no service of this checkout runs on port {port}: start it with `make serve`, or set PORT "
        "(and LOG_DIR) as it has them"
    )


def main() -> int:
    """`python -m launch.state`: send the reload signal to the service on PORT."""
    try:
        send_reload(port_from_environment("PORT", 5003))
    except LaunchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print("reload requested: the service prints whether it has loaded the models")
    return 0


if __name__ == "__main__":
    sys.exit(main())

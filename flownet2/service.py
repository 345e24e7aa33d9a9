"""The server that a command uses; in a checkout, a command can start its own."""

import contextlib
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from flownet2.client import DEFAULT_SERVER, Client
from flownet2.errors import UNREACHABLE, Error, FlowError
from flownet2.processes import ending_with_parent

CHECKOUT = Path(__file__).parent.parent
START_SECONDS = 300.0
"""Time limit for the start of a server."""
WAIT_SECONDS = 30.0
"""Time limit for a named server that does not answer, as while it restarts."""


class NoServer(Error):
    """Raised when no server answers and none can be started."""


@contextlib.contextmanager
def server(named: str | None, say: Callable[[str], None]) -> Iterator[str]:
    """Yield the URL of a server that answers; a server that was started ends with the context.

    Args:
        named: URLs, separated by commas. Default: `FLOWNET2_URL`, else the default server, else a
            server that is started here.
        say: receives a line before each wait.

    Raises:
        NoServer: nothing answers.
        FlowError: a URL is invalid, or something other than a server answers.
    """
    url = named or os.environ.get("FLOWNET2_URL")
    reason = _reason(url or DEFAULT_SERVER, patience=0)
    if reason is not None and url:
        say(f"{reason}: waiting up to {WAIT_SECONDS:g} s for it")
        reason = _reason(url, patience=WAIT_SECONDS)
    if reason is None:
        yield url or DEFAULT_SERVER
    elif url:
        raise NoServer(f"{reason}: start a server there, or name another one with --server")
    elif not is_checkout():
        raise NoServer(
            f"{reason}: start a server (`make serve` in a checkout of the project), or name one "
            "with --server or FLOWNET2_URL"
        )
    else:
        with _started(say) as started:
            yield started


def is_checkout() -> bool:
    """Return True in a checkout of the project, from which a server can be started."""
    return (CHECKOUT / "pyproject.toml").exists()


def _reason(url: str, patience: float) -> str | None:
    """Return why nothing answers at a URL within `patience` seconds, or None."""
    try:
        with Client(url, patience=patience) as client:
            client.models()
    except FlowError as error:
        if error.type != UNREACHABLE:
            raise
        return error.detail
    return None


@contextlib.contextmanager
def _started(say: Callable[[str], None]) -> Iterator[str]:
    names = ("PORT", "TRITON_HTTP_PORT", "TRITON_GRPC_PORT", "TRITON_METRICS_PORT")
    with contextlib.ExitStack() as stack:
        listeners = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in names]
        ports = {
            name: str(listener.getsockname()[1])
            for name, listener in zip(names, listeners, strict=True)
        }
    url = f"http://127.0.0.1:{ports['PORT']}"
    say("no server answers: starting one for this command")
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(  # noqa: S603
            ending_with_parent([sys.executable, "-m", "launch"]),
            cwd=CHECKOUT,
            env={**os.environ, "HOST": "127.0.0.1", **ports},
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C stops the command, which then stops the server
        )
        try:
            deadline = time.monotonic() + START_SECONDS
            while _reason(url, patience=0) is not None:
                if process.poll() is not None or time.monotonic() > deadline:
                    log.seek(0)
                    lines = [line.strip() for line in log if "error:" in line] or [
                        "no reason given"
                    ]
                    raise NoServer(f"no server could be started: {lines[-1]}")
                time.sleep(0.2)
            yield url
        finally:
            process.terminate()
            process.wait()

"""The gateway (`python -m gateway`) as a child process in front of a Triton."""

import contextlib
import os
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path

from launch.check import answers_ok, reachable
from launch.child import Child, Echo
from launch.triton import Address, is_ready

START_SECONDS = 60.0
STOP_SECONDS = 30.0  # it gives requests in flight 25 seconds
PROJECT = Path(__file__).parent.parent


@contextlib.contextmanager
def serve(
    triton: Address,
    port: int,
    *,
    echo: Echo = lambda line: None,
    stop: threading.Event | None = None,
    settings: Mapping[str, str] | None = None,
) -> Iterator[Child]:
    """Run a gateway on Triton's host, ready when the block begins, gone after it.

    Where its Triton is not ready either, it is enough that the gateway answers.

    Args:
        triton: where its Triton listens.
        port: where it listens itself.
        echo: receives its log lines.
        stop: set from elsewhere, ends the wait for readiness early.
        settings: environment variables of the gateway besides those of this process.

    Raises:
        LaunchError: it ended, or was not ready in time.
    """
    search = (str(PROJECT), os.environ.get("PYTHONPATH", ""))
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, search)),
        "PYTHONUNBUFFERED": "1",
        "HOST": triton.host,
        "PORT": str(port),
        "TRITON_ENDPOINTS": f"{reachable(triton.host)}:{triton.grpc_port}",
        **(settings or {}),
    }
    child = Child("gateway", [sys.executable, "-m", "gateway"], environment, echo)
    try:
        child.wait_until(
            lambda: (
                answers_ok(triton.host, port, "/readyz")
                or (not is_ready(triton) and answers_ok(triton.host, port, "/livez"))
            ),
            START_SECONDS,
            stop or threading.Event(),
        )
        yield child
    finally:
        child.stop(STOP_SECONDS)


def fault(host: str, port: int) -> None:
    """Make sure that a gateway answers.

    Raises:
        OSError: it does not.
    """
    if not answers_ok(host, port, "/livez"):
        raise TimeoutError

"""The gateway (`python -m gateway`) as a child process in front of a Triton."""

import contextlib
import os
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path

from flownet2.contract import MODEL_NAME
from launch.check import answers_ok
from launch.child import Child, Echo
from launch.ports import bracketed, reachable
from launch.triton import Address, serves

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
    """Run a gateway on Triton's host, ready when the block begins, stopped after it.

    While Triton does not serve the default model, a gateway that is alive counts as ready.

    Args:
        triton: address of its Triton.
        port: port that it listens on.
        echo: receives its log lines.
        stop: when set, ends the wait for readiness early.
        settings: environment variables of the gateway, besides those of this process.

    Raises:
        LaunchError: it exited, or was not ready in time.
    """
    search = (str(PROJECT), os.environ.get("PYTHONPATH", ""))
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, search)),
        "PYTHONUNBUFFERED": "1",
        "HOST": triton.host,
        "PORT": str(port),
        "TRITON_METRICS_PORT": str(triton.metrics_port),
        "TRITON_ENDPOINTS": f"{bracketed(reachable(triton.host))}:{triton.grpc_port}",
        **(settings or {}),
    }
    default = environment.get("GATEWAY_DEFAULT_MODEL") or MODEL_NAME
    child = Child("gateway", [sys.executable, "-m", "gateway"], environment, echo)
    try:
        child.wait_until(
            lambda: (
                answers_ok(triton.host, port, "/readyz")
                or (not serves(triton, default) and answers_ok(triton.host, port, "/livez"))
            ),
            START_SECONDS,
            stop or threading.Event(),
        )
        yield child
    finally:
        child.stop(STOP_SECONDS)


def fault(host: str, port: int) -> None:
    """Check that a gateway is alive.

    Raises:
        OSError: it does not answer.
    """
    if not answers_ok(host, port, "/livez"):
        raise TimeoutError("/livez")

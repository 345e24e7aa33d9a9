"""`python -m launch`: tritonserver and the gateway together, until Ctrl-C or SIGTERM.

Environment: HOST (127.0.0.1; an IPv4 address or a name of one), PORT (5003, the gateway),
TRITON_HTTP_PORT (8000), TRITON_GRPC_PORT (8001), TRITON_METRICS_PORT (8002), MODEL_REPOSITORY
(`model_repository` of this checkout); the gateway reads its own variables besides.
"""

import os
import signal
import sys
import threading
from pathlib import Path

from launch import gateway, triton
from launch.child import Child
from launch.errors import LaunchError
from launch.ports import check_free, port_from_environment

PROJECT = Path(__file__).parent.parent


def main() -> int:
    """Run both servers; 0 after a signal, 1 when one cannot start or ends by itself."""
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        # Under nohup the end of the terminal stays ignored. SIGINT does not: what a script starts
        # with `&` begins with it ignored, and would outlive a Ctrl-C of that script.
        if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, lambda *_: stop.set())

    def log(name: str, line: str) -> None:
        try:
            print(f"{name:7} | {line}", flush=True)
        except BrokenPipeError:  # whoever read our output is gone
            stop.set()

    try:
        address = triton.Address.from_environment()
        port = port_from_environment("PORT", 5003)
        check_free(
            address.host,
            {
                "PORT": port,
                "TRITON_HTTP_PORT": address.http_port,
                "TRITON_GRPC_PORT": address.grpc_port,
                "TRITON_METRICS_PORT": address.metrics_port,
            },
        )
        repository = Path(os.environ.get("MODEL_REPOSITORY") or PROJECT / "model_repository")
        with (
            triton.serve(
                repository, address=address, echo=lambda line: log("triton", line), stop=stop
            ) as server,
            gateway.serve(
                address, port, echo=lambda line: log("gateway", line), stop=stop
            ) as service,
        ):
            if not stop.is_set():
                url = f"http://{triton.reachable(address.host)}:{port}"
                log("launch", f"ready on {url} - stop with Ctrl-C")
            return _watch((server.child, service), stop)
    except LaunchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _watch(children: tuple[Child, ...], stop: threading.Event) -> int:
    """Wait for a signal (0), or for one of the two to end by itself (1)."""
    while not stop.wait(0.2):
        for child in children:
            if child.exit_status() is not None:
                print(
                    f"error: {child.name} ended by itself with exit status {child.exit_status()}",
                    file=sys.stderr,
                )
                return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

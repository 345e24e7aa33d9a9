"""`python -m launch`: Triton and the gateway together, until Ctrl-C or SIGTERM.

Environment: HOST (127.0.0.1; an IPv4 address or a name of one), PORT (5003, the gateway),
TRITON_HTTP_PORT (8000), TRITON_GRPC_PORT (8001), TRITON_METRICS_PORT (8002), MODEL_REPOSITORY
(`model_repository` of this checkout), VERBOSE (1: what the two print is shown, not only their
errors), TRITON_ADMIN_KEY_FILE (a file with the key to what Triton opens to its operator alone); the
gateway reads its own variables besides. SIGUSR1 has Triton load the repository's models again.
"""

import contextlib
import functools
import logging.handlers
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

from launch import gateway, triton
from launch.check import HealthCheck, url
from launch.child import Child, Echo, is_error
from launch.errors import LaunchError
from launch.ports import check_free, port_from_environment
from launch.supervisor import Supervisor

PROJECT = Path(__file__).parent.parent
LOG_BYTES = 2**24


def main() -> int:
    """Run both servers; 0 after a signal, 1 when one cannot start or is given up."""
    stop, changed = threading.Event(), threading.Event()
    signal.signal(signal.SIGUSR1, lambda *_: changed.set())
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        # Under nohup the end of the terminal stays ignored. SIGINT does not: what a script starts
        # with `&` begins with it ignored, and would outlive a Ctrl-C of that script.
        if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, lambda *_: stop.set())

    def say(line: str) -> None:
        try:
            print(line, flush=True)
        except BrokenPipeError:  # whoever read our output is gone
            stop.set()

    try:
        _run(stop, changed, say)
    except (LaunchError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _run(stop: threading.Event, changed: threading.Event, say: Echo) -> None:
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
    log = PROJECT / "build" / f"serve-{port}.log"
    echo = _output(log, say)

    running: list[triton.Triton] = []

    @contextlib.contextmanager
    def start_triton(stop: threading.Event) -> Iterator[Child]:
        with triton.serve(repository, address=address, echo=echo("triton"), stop=stop) as server:
            running[:] = [server]
            yield server.child

    def reload() -> None:
        running[0].reload()
        say("Triton has loaded the models again")

    def start_gateway(stop: threading.Event) -> AbstractContextManager[Child]:
        return gateway.serve(address, port, echo=echo("gateway"), stop=stop)

    say(f"Starting Triton: some seconds, more with a large network (log: {log})")
    begin = time.monotonic()
    health = HealthCheck(address.host, address.http_port)
    with Supervisor(start_triton, health.fault, say) as server:
        if not _is_ready(server, stop):
            return
        say(f"Triton is ready after {time.monotonic() - begin:.0f} s; starting the gateway")
        check = functools.partial(gateway.fault, address.host, port)
        with Supervisor(start_gateway, check, say) as service:
            if not _is_ready(service, stop):
                return
            say(f"Ready: open {url(address.host, port)}/ (Ctrl-C stops it)")
            while not stop.wait(0.2):
                server.ready()
                service.ready()
                triton.reload_when(changed, reload, say)


def _is_ready(server: Supervisor, stop: threading.Event) -> bool:
    """Wait for a server; False when told to stop first."""
    while not server.ready():
        if stop.wait(0.1):
            return False
    return True


def _output(file: Path, say: Echo) -> Callable[[str], Echo]:
    """Where a server's lines go, by its name: into the file, and errors to the terminal too."""
    file.parent.mkdir(exist_ok=True)
    file.unlink(missing_ok=True)
    log = logging.getLogger("launch")
    log.setLevel(logging.INFO)
    log.addHandler(logging.handlers.RotatingFileHandler(file, maxBytes=LOG_BYTES, backupCount=1))
    verbose = bool(os.environ.get("VERBOSE"))

    def echo(name: str, line: str) -> None:
        log.info("%-7s | %s", name, line)
        if verbose or is_error(line):
            say(f"{name:7} | {line}")

    return lambda name: functools.partial(echo, name)


if __name__ == "__main__":
    sys.exit(main())

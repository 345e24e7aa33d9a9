"""`python -m launch`: run Triton and the gateway until Ctrl-C or SIGTERM.

Environment variables, besides those of the gateway:

HOST                    address to listen on, IPv4 or IPv6, or a host name (127.0.0.1)
PORT                    port of the gateway (5003)
TRITON_HTTP_PORT, TRITON_GRPC_PORT, TRITON_METRICS_PORT
                        ports of Triton (8000, 8001, 8002)
MODEL_REPOSITORY        folder of models (`model_repository` of this checkout)
DEVICE                  cpu: do not use a GPU
LOG_DIR                 folder for the log (`build` of this checkout)
VERBOSE                 1: print all output of both servers, not only their errors
TRITON_ADMIN_KEY_FILE   file with the operator's key for Triton's restricted endpoints

SIGUSR1 (`make reload`) has Triton load the models again.
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

from flownet2.errors import Error
from launch import gateway, state, triton, wheel
from launch.check import HealthCheck, url
from launch.child import Child, Echo, is_error
from launch.gpu import installed_packages, usable_gpu
from launch.ports import check_free, port_from_environment
from launch.supervisor import Supervisor

PROJECT = Path(__file__).parent.parent
LOG_BYTES = 2**24


def main() -> int:
    """Run both servers; return 0 after a signal, 1 if one cannot start or is given up."""
    stop, changed = threading.Event(), threading.Event()
    signal.signal(signal.SIGUSR1, lambda *_: changed.set())
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        # Under nohup SIGHUP stays ignored. SIGINT does not: a script's `command &` starts with it
        # ignored, and would outlive a Ctrl-C of that script.
        if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, lambda *_: stop.set())
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    logging.raiseExceptions = False  # a full disk costs the log, not the service

    def say(line: str) -> None:
        try:
            print(line, flush=True)
        except BrokenPipeError:  # our output is piped to a process that has exited
            stop.set()
        except OSError:  # a full disk
            pass

    try:
        _run(stop, changed, say)
    except (Error, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _run(stop: threading.Event, changed: threading.Event, say: Echo) -> None:
    address = triton.Address.from_environment()
    port = port_from_environment("PORT", 5003)
    check_free(address.host, {"PORT": port, **address.ports})
    repository = Path(os.environ.get("MODEL_REPOSITORY") or PROJECT / "model_repository")
    log = state.folder() / f"serve-{port}.log"
    echo = _output(log, say)

    running: list[triton.Triton] = []

    @contextlib.contextmanager
    def start_triton(stop: threading.Event) -> Iterator[Child]:
        with wheel.serve(
            repository,
            address=address,
            gpu_packages=packages,
            echo=echo("triton"),
            say=say,
            stop=stop,
        ) as server:
            running[:] = [server]
            yield server.child

    def reload() -> None:
        running[0].reload()
        say("Triton has loaded the models again")

    def start_gateway(stop: threading.Event) -> AbstractContextManager[Child]:
        return gateway.serve(address, port, echo=echo("gateway"), stop=stop)

    packages = None
    if gpu := usable_gpu(say):
        packages = installed_packages()
        used = "" if packages else " is not used: `make serve` installs its packages"
        say(f"GPU: {gpu.name}{used}")
    say(f"Starting Triton: a few seconds, longer with a large network (log: {log})")
    begin = time.monotonic()
    health = HealthCheck(address.host, address.http_port)
    with state.announced(port), Supervisor(start_triton, health.fault, say) as server:
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
    """Wait for a server; return False if `stop` is set first."""
    while not server.ready():
        if stop.wait(0.1):
            return False
    return True


def _output(file: Path, say: Echo) -> Callable[[str], Echo]:
    """Return a function from a server's name to the receiver of its output lines.

    All lines go into the file, errors to the terminal too.
    """
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

"""Several gateway processes on one port; uvicorn's supervisor replaces one that dies or hangs."""

import contextlib
import os
import shutil
import signal
import socket
import tempfile
from collections.abc import AsyncIterator
from typing import Any, NoReturn

import uvicorn
from fastapi import FastAPI
from prometheus_client import multiprocess
from uvicorn.config import STARTUP_FAILURE
from uvicorn.supervisors import Multiprocess

from flownet2.memory import keep_freed_memory
from flownet2.processes import end_with_parent, is_orphan
from gateway import logs
from gateway.app import create_app
from gateway.metrics import SHARED_FOLDER
from gateway.settings import Settings

STOP_SOON = signal.SIGUSR1
"""Signal to a process that will get SIGTERM soon: its `/readyz` fails from then on."""

HANG_SECONDS = 30
"""A process that does not answer the supervisor for this long is replaced. Encoding a large flow as
JSON holds Python's lock for most of a second, and several threads may do so in succession."""


class Supervisor(Multiprocess):
    """Supervisor that stops like a single process: `/readyz` fails first, and after a delay no
    connections are accepted."""

    def __init__(
        self, config: uvicorn.Config, sockets: list[socket.socket], delay_s: float
    ) -> None:
        super().__init__(config, sockets)
        self._delay_s = delay_s

    def handle_term(self) -> None:
        """Begin the shutdown."""
        for process in self.processes:
            if process.pid and process.exitcode is None:
                os.kill(process.pid, STOP_SOON)
        self.should_exit.wait(self._delay_s)
        super().handle_term()

    def keep_subprocess_alive(self) -> None:
        """Replace processes that died, and remove their gauges."""
        before = {process.pid for process in self.processes}
        super().keep_subprocess_alive()
        for pid in before - {process.pid for process in self.processes}:
            multiprocess.mark_process_dead(pid)  # type: ignore[no-untyped-call]

    @property
    def failed(self) -> bool:
        """True if a process could not start."""
        return any(process.exitcode == STARTUP_FAILURE for process in self.processes)


def serve(settings: Settings, listener: socket.socket, **options: Any) -> int:
    """Serve until a signal arrives, and return the exit status.

    Args:
        settings: settings of all processes together.
        listener: socket on which they accept connections.
        options: uvicorn's options.
    """
    # /dev/shm is writable in containers with a read-only root too.
    with tempfile.TemporaryDirectory(prefix="gateway-metrics-", dir="/dev/shm") as folder:
        os.environ[SHARED_FOLDER] = folder
        config = uvicorn.Config(
            "gateway.workers:create_worker",
            factory=True,
            workers=settings.processes,
            timeout_worker_healthcheck=HANG_SECONDS,
            **options,
        )
        supervisor = Supervisor(config, [listener], settings.shutdown_delay_s)
        supervisor.run()
        return int(supervisor.failed)


def end_worker() -> NoReturn:
    """End this process. If its supervisor was killed, remove the supervisor's folder."""
    if is_orphan():
        shutil.rmtree(os.environ[SHARED_FOLDER], ignore_errors=True)
    # Without waiting for threads of abandoned requests, which cannot be stopped.
    os._exit(0)


def create_worker() -> FastAPI:
    """Return the application of one process, with its share of the limits."""
    end_with_parent()
    if is_orphan():  # before the call above took effect
        end_worker()
    keep_freed_memory()
    settings = Settings()
    logs.configure(settings.log_level)
    app = create_app(settings.of_one_process())
    lifespan = app.router.lifespan_context

    @contextlib.asynccontextmanager
    async def until_the_end(app: FastAPI) -> AsyncIterator[Any]:
        async with lifespan(app) as state:
            yield state
        end_worker()

    def announce(*_: object) -> None:
        app.state.gateway.stopping = True

    app.router.lifespan_context = until_the_end
    signal.signal(STOP_SOON, announce)
    return app

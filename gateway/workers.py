"""Several processes on one port, by uvicorn's supervisor: it replaces one that died or hangs."""

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

from flownet2.processes import end_with_parent, is_orphan
from gateway import logs
from gateway.app import create_app
from gateway.metrics import SHARED_FOLDER
from gateway.settings import Settings
from gateway.system import tune_malloc

ANNOUNCE = signal.SIGUSR1
"""Tells a process that it will be asked to end: its `/readyz` fails from now on."""

HANG_SECONDS = 30
"""A process that says nothing for so long is replaced. Encoding a large flow as JSON holds Python's
lock for most of a second, and several threads may do so in turns."""


class Supervisor(Multiprocess):
    """Stops as one process does: first `/readyz` fails, after a delay nothing is accepted."""

    def __init__(
        self, config: uvicorn.Config, sockets: list[socket.socket], delay_s: float
    ) -> None:
        super().__init__(config, sockets)
        self._delay_s = delay_s

    def handle_term(self) -> None:
        """Begin to stop."""
        for process in self.processes:
            if process.pid and process.exitcode is None:
                os.kill(process.pid, ANNOUNCE)
        self.should_exit.wait(self._delay_s)
        super().handle_term()

    def keep_subprocess_alive(self) -> None:
        """Replace those that died, and forget their gauges."""
        before = {process.pid for process in self.processes}
        super().keep_subprocess_alive()
        for pid in before - {process.pid for process in self.processes}:
            multiprocess.mark_process_dead(pid)  # type: ignore[no-untyped-call]

    @property
    def failed(self) -> bool:
        """Whether a process could not start."""
        return any(process.exitcode == STARTUP_FAILURE for process in self.processes)


def serve(settings: Settings, listener: socket.socket, **options: Any) -> int:
    """Serve until a signal ends it; the exit status.

    Args:
        settings: those of all processes together.
        listener: the socket that they accept connections from.
        options: of uvicorn.
    """
    # In memory, and where a container without a writable disk has a place for it.
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
    """End this process, and for a supervisor that was killed, remove what it could not."""
    if is_orphan():
        shutil.rmtree(os.environ[SHARED_FOLDER], ignore_errors=True)
    # Without the threads that still decode what nobody waits for: nothing can stop them.
    os._exit(0)


def create_worker() -> FastAPI:
    """The application in one of the processes, with its part of the limits."""
    end_with_parent()
    if is_orphan():  # before the kernel was asked to watch
        end_worker()
    tune_malloc()
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
    signal.signal(ANNOUNCE, announce)
    return app

"""Keeps a server running: starts it again when it ends, or when it no longer serves."""

import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import TracebackType

from launch.child import Child, Echo
from launch.errors import LaunchError

Start = Callable[[threading.Event], AbstractContextManager[Child]]
Fault = Callable[[], str | None]

INTERVAL_SECONDS = 2.0
SILENT_SECONDS = 30.0  # a process that is stopped or deadlocked; a busy one answers sooner
SETTLED_SECONDS = 10.0
ATTEMPTS = 6


class Supervisor:
    """Runs a server in a thread of its own while its block lasts.

    A server that ends, that says what is wrong with it, or that is silent for
    :data:`SILENT_SECONDS`, is started again: at once, then after 1, 2, 4, ... seconds if it fails
    before it was ready for :data:`SETTLED_SECONDS`, and given up after :data:`ATTEMPTS` such
    failures in a row. A first start that fails is not repeated.
    """

    def __init__(self, start: Start, fault: Fault, say: Echo) -> None:
        """Describe the server.

        Args:
            start: runs the server, ready when its block begins (or when the event is set, which
                ends the wait early) and gone after it.
            fault: asks the server; what is wrong with it, if anything. OSError: no answer.
            say: receives a sentence for each restart.
        """
        self._start, self._fault, self._say = start, fault, say
        self._ready = threading.Event()
        self._stop = threading.Event()
        self._error: LaunchError | None = None
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> "Supervisor":
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._thread.join()

    def ready(self) -> bool:
        """Whether the server has been ready once.

        Raises:
            LaunchError: its first start failed, or it was given up.
        """
        if self._error:
            raise self._error
        return self._ready.is_set()

    def _run(self) -> None:
        try:
            self._keep_running()
        except LaunchError as error:
            self._error = error

    def _keep_running(self) -> None:
        failures = 0
        while not self._stop.is_set():
            ready_since = time.monotonic()
            try:
                with self._start(self._stop) as child:
                    self._ready.set()
                    ready_since = time.monotonic()
                    fault = self._watch(child)
                    if fault is None:
                        return
                    child.kill()
            except LaunchError as error:
                if not self._ready.is_set():
                    raise
                fault = str(error)
            settled = time.monotonic() - ready_since > SETTLED_SECONDS
            failures = 1 if settled else failures + 1
            if failures == ATTEMPTS:
                raise LaunchError(f"given up after {ATTEMPTS} failures in a row: {fault}")
            self._say(f"{fault}: starting it again")
            self._stop.wait(2 ** (failures - 2) if failures > 1 else 0)

    def _watch(self, child: Child) -> str | None:
        """Wait for the server's fault; None when told to stop."""
        heard = asked = time.monotonic()
        while not self._stop.wait(0.1):
            if ended := child.ended():
                return ended
            if time.monotonic() - asked < INTERVAL_SECONDS:
                continue
            try:
                if fault := self._fault():
                    return fault
                heard = time.monotonic()
            except OSError:
                if time.monotonic() - heard > SILENT_SECONDS:
                    return f"{child.name} has not answered for {SILENT_SECONDS:.0f} s"
            asked = time.monotonic()
        return None

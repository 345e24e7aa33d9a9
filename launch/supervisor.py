"""Keeps a server running: restarts it when it exits, or when it no longer serves."""

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
SILENT_SECONDS = 30.0  # then it is stopped or deadlocked: a busy process answers sooner
SETTLED_SECONDS = 10.0
ATTEMPTS = 6


class Supervisor:
    """Context manager that keeps a server running, from a separate thread.

    A server that exits, fails its health check, or does not answer for :data:`SILENT_SECONDS` is
    restarted: at once, then after 1, 2, 4, ... seconds if it fails within :data:`SETTLED_SECONDS`
    of being ready. After :data:`ATTEMPTS` such failures in a row it is given up. A failed first
    start is not retried.
    """

    def __init__(self, start: Start, fault: Fault, say: Echo) -> None:
        """Set how to start and check the server.

        Args:
            start: runs the server, ready when its block begins and stopped after it; setting the
                event ends the wait for readiness early.
            fault: health check; returns what is wrong with the server, or None. Raises OSError if
                the server does not answer.
            say: receives a line for each restart.
        """
        self._start, self._fault, self._say = start, fault, say
        self._ready = threading.Event()
        self._stop = threading.Event()
        self._error: Exception | None = None
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
        """Return True once the server has been ready.

        Raises:
            LaunchError: the server was given up.
            Exception: the exception of the first start.
        """
        if self._error:
            raise self._error
        return self._ready.is_set()

    def _run(self) -> None:
        try:
            self._keep_running()
        except Exception as error:  # passed to the caller's thread, which waits for it
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
            except Exception as error:
                if not self._ready.is_set():
                    raise
                fault = str(error) if isinstance(error, LaunchError) else repr(error)
            settled = time.monotonic() - ready_since > SETTLED_SECONDS
            failures = 1 if settled else failures + 1
            if failures == ATTEMPTS:
                raise LaunchError(f"given up after {ATTEMPTS} failures in a row: {fault}")
            self._say(f"{fault}: starting it again")
            self._stop.wait(2 ** (failures - 2) if failures > 1 else 0)

    def _watch(self, child: Child) -> str | None:
        """Wait until the server fails and return the reason; None if it is to stop."""
        answered = checked = time.monotonic()
        while not self._stop.wait(0.1):
            if ended := child.ended():
                return ended
            if time.monotonic() - checked < INTERVAL_SECONDS:
                continue
            try:
                if fault := self._fault():
                    return fault
                answered = time.monotonic()
            except Exception as error:  # OSError, or a response that the check cannot read
                if time.monotonic() - answered > SILENT_SECONDS:
                    return f"{child.name} has not answered for {SILENT_SECONDS:.0f} s: {error!r}"
            checked = time.monotonic()
        return None

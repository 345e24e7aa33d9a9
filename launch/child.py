"""A child process: its output, waiting until it is ready, and stopping it with its children."""

import contextlib
import os
import re
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from flownet2.processes import ending_with_parent
from launch.errors import LaunchError

KEPT_LINES = 400

# Error levels of Triton and of the gateway, the last line of a traceback, and a crash in C++; not
# the lines that Triton prints at every failed start, or on every machine without a GPU.
ERROR = re.compile(
    r'Z E \d+ |^{.*"level":"(error|critical)"|^\w*(Error|Exception): |^terminate called '
)
IGNORED = re.compile(
    r"CudaDriverHelper|Failed to initialize NVML|Internal - failed to load all models"
)
# Triton does not notice that a stub of its Python backend has crashed, and waits for it.
CRASH = re.compile(r"^terminate called ")

Echo = Callable[[str], None]


def is_error(line: str) -> bool:
    """Return True if a line of a child's output reports an error."""
    return bool(ERROR.search(line) and not IGNORED.search(line))


class Child:
    """A running command.

    It leads its own process group, so that Ctrl-C in a terminal reaches only the launcher, which
    then stops its children in order. The kernel sends SIGTERM to the child when the thread that
    started it ends, so start it from a thread that outlives the child.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str | Path],
        environment: Mapping[str, str],
        echo: Echo,
        inherited: Sequence[int] = (),
    ) -> None:
        """Start the command.

        Args:
            name: name of the child in messages.
            command: program and arguments.
            environment: the whole environment of the child.
            echo: receives every line of output, without the line end.
            inherited: file descriptors that stay open in the child.
        """
        self.name = name
        self.lines: deque[str] = deque(maxlen=KEPT_LINES)
        self._echo = echo
        self._crashed = threading.Event()
        self._process = subprocess.Popen(  # noqa: S603
            ending_with_parent(command),
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            bufsize=1,
            start_new_session=True,
            pass_fds=inherited,
        )
        self._reader = threading.Thread(target=self._read, name=f"{name} log", daemon=True)
        self._reader.start()

    @property
    def pid(self) -> int:
        """Process id, which is the id of the child's process group too."""
        return self._process.pid

    def exit_status(self) -> int | None:
        """Exit status (negative: the signal that ended it), or None while it runs."""
        return self._process.poll()

    def ended(self) -> str | None:
        """Return a sentence with the exit status, or None while the command runs."""
        status = self.exit_status()
        return None if status is None else f"{self.name} ended with exit status {status}"

    def wait_until(self, ready: Callable[[], bool], seconds: float, stop: threading.Event) -> bool:
        """Wait until `ready()` returns True; return False if `stop` is set first.

        Raises:
            LaunchError: the child exited, one of its processes crashed, or `seconds` passed.
        """
        deadline = time.monotonic() + seconds
        while not ready():
            status = self.exit_status()
            if status is not None:
                self._reader.join(timeout=2)
                raise LaunchError(
                    f"{self.name} ended with exit status {status} before it was ready: "
                    f"{self._reason()}"
                )
            if self._crashed.is_set():
                raise LaunchError(f"{self.name} crashed before it was ready: {self._reason()}")
            if time.monotonic() > deadline:
                raise LaunchError(
                    f"{self.name} was not ready within {seconds:.0f} s: {self._reason()}"
                )
            if stop.wait(0.1):
                return False
        return True

    def stop(self, grace: float) -> None:
        """Send SIGTERM, and after `grace` seconds SIGKILL to the whole process group."""
        if self.exit_status() is None:
            self._process.terminate()
            try:
                self._process.wait(timeout=grace)
            except subprocess.TimeoutExpired:
                self._echo(f"{self.name}: still running after {grace:.0f} s, killed")
        self.kill()

    def kill(self) -> None:
        """Send SIGKILL to the remaining processes of the group."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self._process.wait()
        with contextlib.suppress(ChildProcessError):  # raised when no process is left
            while True:  # in a container, orphans become children of its first process
                os.waitpid(-self.pid, 0)
        self._reader.join(timeout=2)
        if self._process.stdout:
            self._process.stdout.close()

    def _read(self) -> None:
        for line in self._process.stdout or ():
            self.lines.append(line.rstrip("\n"))
            self._echo(self.lines[-1])
            if CRASH.search(line):
                self._crashed.set()

    def _reason(self) -> str:
        """Return the output line that most likely names the cause."""
        lines = [line.strip() for line in list(self.lines) if line.strip()]
        return (list(filter(is_error, lines)) or lines or ["it printed nothing"])[-1]

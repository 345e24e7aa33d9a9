"""`python -m launch` as a child process, with ports of its own."""

import os
import subprocess
import sys
import threading
from pathlib import Path

from launch.ports import free_ports
from tests.support.gateway_stack import wait_until
from tests.support.processes import processes_of_group

PROJECT = Path(__file__).parents[2]


class Launcher:
    """`python -m launch` over a repository, on ports of its own."""

    def __init__(self, repository: Path, *prefix: str, **environment: str) -> None:
        self.port, self.http, grpc, metrics = free_ports(4)
        self.url = f"http://127.0.0.1:{self.port}"
        self.ports = (self.port, self.http, grpc, metrics)
        self.process = subprocess.Popen(
            [*prefix, sys.executable, "-m", "launch"],
            cwd=PROJECT,
            env={
                **os.environ,
                "MODEL_REPOSITORY": str(repository),
                "PORT": str(self.port),
                "TRITON_HTTP_PORT": str(self.http),
                "TRITON_GRPC_PORT": str(grpc),
                "TRITON_METRICS_PORT": str(metrics),
                **environment,
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        wait_until(lambda: self.said("Ready: ") or self.process.poll() is not None, 120)
        assert self.process.poll() is None, self.lines

    def _read(self) -> None:
        for line in self.process.stdout or ():
            self.lines.append(line)

    def said(self, words: str) -> bool:
        return any(words in line for line in self.lines)

    def groups(self) -> list[int]:
        """Process groups of the children: each leads its own."""
        tasks = Path(f"/proc/{self.process.pid}/task").glob("*/children")
        return [int(child) for task in tasks for child in task.read_text().split()]

    def processes(self) -> dict[str, int]:
        """Processes of the children, by name."""
        found: dict[str, int] = {}
        for group in self.groups():
            found |= processes_of_group(group)
        return found

    def stop(self, number: int) -> int:
        self.process.send_signal(number)
        status = self.process.wait(timeout=60)
        self._reader.join(timeout=10)
        assert self.process.stdout is not None
        self.process.stdout.close()
        return status

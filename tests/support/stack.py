"""The whole service as `make serve` runs it: real tritonserver, real gateway, shipped weights."""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx2

from launch.ports import free_ports

ROOT = Path(__file__).parents[2]
PORTS = ("PORT", "TRITON_HTTP_PORT", "TRITON_GRPC_PORT", "TRITON_METRICS_PORT")


@dataclass(frozen=True)
class Stack:
    """A running service and its ports by variable."""

    process: subprocess.Popen[bytes]
    ports: dict[str, int]

    @property
    def url(self) -> str:
        """The gateway."""
        return f"http://127.0.0.1:{self.ports['PORT']}"


@contextlib.contextmanager
def run_stack(repository: Path) -> Iterator[Stack]:
    """Start the service over a repository on free ports; Ctrl-C it at the end."""
    ports = dict(zip(PORTS, free_ports(len(PORTS)), strict=True))
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "launch"],
            cwd=ROOT,
            env={
                **os.environ,
                "MODEL_REPOSITORY": str(repository),
                **{name: str(port) for name, port in ports.items()},
            },
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        try:
            while process.poll() is None and not _ready(ports["PORT"]):
                time.sleep(0.2)
            log.seek(0)
            assert process.poll() is None, log.read()
            yield Stack(process, ports)
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(timeout=60)


def _ready(port: int) -> bool:
    try:
        return httpx2.get(f"http://127.0.0.1:{port}/readyz").status_code == 200
    except httpx2.TransportError:
        return False

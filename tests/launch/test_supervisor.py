"""Restarts, and their end; shared memory that a killed process leaves; the check of a Triton."""

import contextlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from launch import supervisor, triton
from launch.check import Canary
from launch.child import Child
from launch.errors import LaunchError
from launch.shared_memory import FOLDER, region_names
from launch.supervisor import Supervisor
from tests.support.gateway_stack import wait_until, write_model

PROJECT = Path(__file__).parents[2]


@contextlib.contextmanager
def shell(script: str) -> Iterator[Child]:
    child = Child("it", ["/bin/sh", "-c", script], os.environ, lambda _: None)
    try:
        yield child
    finally:
        child.kill()


def run(server: Supervisor) -> None:
    """Run a server until it fails for good."""
    with server:
        while True:
            server.ready()
            time.sleep(0.05)


def silent() -> None:
    raise TimeoutError


@pytest.mark.parametrize(
    ("script", "fault", "reason"),
    [
        ("exit 3", lambda: None, "it ended with exit status 3"),
        ("sleep 60", lambda: "it is ill", "it is ill"),
        ("sleep 60", silent, "it has not answered for 0 s"),
    ],
)
def test_a_server_that_fails_again_and_again_is_given_up(
    monkeypatch: pytest.MonkeyPatch, script: str, fault: supervisor.Fault, reason: str
) -> None:
    monkeypatch.setattr(supervisor, "ATTEMPTS", 2)
    monkeypatch.setattr(supervisor, "INTERVAL_SECONDS", 0.0)
    monkeypatch.setattr(supervisor, "SILENT_SECONDS", 0.0)
    said: list[str] = []
    server = Supervisor(lambda stop: shell(script), fault, said.append)
    with pytest.raises(LaunchError, match=f"given up after 2 failures in a row: {reason}"):
        run(server)
    assert said == [f"{reason}: starting it again"]


def test_a_first_start_that_fails_is_not_repeated() -> None:
    @contextlib.contextmanager
    def start(stop: threading.Event) -> Iterator[Child]:
        raise LaunchError("no such thing")
        yield

    with pytest.raises(LaunchError, match="no such thing"):
        run(Supervisor(start, lambda: None, pytest.fail))


def test_regions_of_the_killed_are_removed_and_those_of_the_living_kept() -> None:
    code = (
        "import os, signal\n"
        "from launch.shared_memory import FOLDER, region_names\n"
        "with region_names() as (prefix, lock):\n"
        "    (FOLDER / f'{prefix}x').touch()\n"
        "    print(prefix, flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    with region_names() as (mine, _):
        (FOLDER / f"{mine}x").touch()
        command = [sys.executable, "-c", code]
        killed = subprocess.run(
            command, cwd=PROJECT, capture_output=True, text=True, check=False
        ).stdout.strip()
        assert list(FOLDER.glob(f"{killed}*"))
        with region_names():
            assert not list(FOLDER.glob(f"{killed.rstrip('-')}*"))
            assert (FOLDER / f"{mine}x").exists()
    assert not list(FOLDER.glob(f"{mine.rstrip('-')}*"))


def test_check_notices_a_dead_stub_and_its_regions_go(tmp_path: Path) -> None:
    write_model(tmp_path)
    with triton.serve(tmp_path) as server:
        canary = Canary(server.address.host, server.address.http_port)
        assert canary.fault() is None
        assert check(server).returncode == 0
        used = Path(f"/proc/{server.child.pid}/maps").read_text()
        regions = [path for path in FOLDER.glob("flownet2-*-*") if path.name in used]
        assert regions
        (stub,) = psutil.Process(server.child.pid).children()
        stub.kill()
        wait_until(canary.fault)
        assert triton.is_ready(server.address)  # as Triton sees it
        checked = check(server)
        assert (checked.returncode, "is not healthy" in checked.stderr) == (1, True)
        server.child.kill()
        assert all(region.exists() for region in regions)
    assert not any(region.exists() for region in regions)


def check(server: triton.Triton) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "launch.check"],
        cwd=PROJECT,
        env={**os.environ, "TRITON_HTTP_PORT": str(server.address.http_port)},
        capture_output=True,
        text=True,
        check=False,
    )

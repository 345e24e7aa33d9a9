"""Restarts, and their end; shared memory that a killed process leaves; the check of a Triton."""

import contextlib
import http.server
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from launch import supervisor, triton, wheel
from launch.check import HealthCheck
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
        ("sleep 60", silent, "it has not answered for 0 s: TimeoutError()"),
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
    with pytest.raises(LaunchError, match="given up after 2 failures in a row"):
        run(server)
    assert said == [f"{reason}: starting it again"]


def test_a_first_start_that_fails_is_not_repeated() -> None:
    @contextlib.contextmanager
    def start(stop: threading.Event) -> Iterator[Child]:
        raise LaunchError("no such thing")
        yield

    with pytest.raises(LaunchError, match="no such thing"):
        run(Supervisor(start, lambda: None, pytest.fail))


class Refusal(http.server.BaseHTTPRequestHandler):
    """A Triton whose inferences end in a 500 with `body`, as a proxy in front of it may send."""

    body = b""

    def do_GET(self) -> None:
        if self.path.endswith("/stats"):
            model = {"name": "flownet2", "inference_stats": {"success": {"count": 0}}}
            self._answer(200, json.dumps({"model_stats": [model]}).encode())
        else:
            self._answer(200, b"{}")

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self._answer(500, self.body)

    def _answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.mark.parametrize("body", [b"", b"<html>bad gateway</html>", b"[1]", b'"x"', b"\xff"])
def test_an_error_that_is_not_tritons_json_restarts_the_server(
    monkeypatch: pytest.MonkeyPatch, body: bytes
) -> None:
    monkeypatch.setattr(Refusal, "body", body)
    monkeypatch.setattr(supervisor, "ATTEMPTS", 2)
    monkeypatch.setattr(supervisor, "INTERVAL_SECONDS", 0.0)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refusal) as triton_server:
        threading.Thread(target=triton_server.serve_forever, daemon=True).start()
        health = HealthCheck("127.0.0.1", triton_server.server_port)
        server = Supervisor(lambda stop: shell("sleep 60"), health.fault, lambda _: None)
        with pytest.raises(LaunchError, match="Triton's model flownet2 fails"):
            run(server)
        triton_server.shutdown()


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyError("a bug")])
def test_any_error_of_the_first_start_ends_the_wait(error: Exception) -> None:
    @contextlib.contextmanager
    def start(stop: threading.Event) -> Iterator[Child]:
        raise error
        yield

    with pytest.raises(type(error)):
        run(Supervisor(start, lambda: None, pytest.fail))


def test_any_error_of_a_later_start_is_a_failure_like_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(supervisor, "ATTEMPTS", 2)
    starts = iter(["exit 3"])

    def start(stop: threading.Event) -> contextlib.AbstractContextManager[Child]:
        for script in starts:
            return shell(script)
        raise OSError(24, "Too many open files")

    with pytest.raises(LaunchError, match=r"given up after 2 failures in a row: .*Too many open"):
        run(Supervisor(start, lambda: None, lambda _: None))


def test_a_check_that_raises_counts_as_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "ATTEMPTS", 2)
    monkeypatch.setattr(supervisor, "INTERVAL_SECONDS", 0.0)
    monkeypatch.setattr(supervisor, "SILENT_SECONDS", 0.0)

    def fault() -> None:
        raise KeyError("model_stats")

    with pytest.raises(LaunchError, match="it has not answered for 0 s: KeyError"):
        run(Supervisor(lambda stop: shell("sleep 60"), fault, lambda _: None))


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
    with wheel.serve(tmp_path) as server:
        health = HealthCheck(server.address.host, server.address.http_port)
        assert health.fault() is None
        assert check(server).returncode == 0
        used = Path(f"/proc/{server.child.pid}/maps").read_text()
        regions = [path for path in FOLDER.glob("flownet2-*-*") if path.name in used]
        assert regions
        (stub,) = psutil.Process(server.child.pid).children()
        stub.kill()
        wait_until(health.fault)
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

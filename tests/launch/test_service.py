"""`python -m launch`: its messages, its shutdown, and restarts of crashed processes."""

import http.client
import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2
import numpy as np
import pytest

from launch import state
from launch.check import answers_ok
from launch.errors import LaunchError
from launch.ports import check_free, free_ports
from tests.support.gateway_stack import (
    as_json,
    encoded,
    expected_flow,
    picture,
    wait_until,
    write_model,
)
from tests.support.launcher import Launcher
from tests.support.processes import processes_of_group

PROJECT = Path(__file__).parents[2]
IMAGES = [picture(seed) for seed in (1, 2)]


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("repository")
    write_model(folder)
    return folder


@pytest.fixture(scope="module")
def launcher(repository: Path) -> Iterator[Launcher]:
    running = Launcher(repository)
    yield running
    running.stop(signal.SIGTERM)


def test_a_handful_of_lines_ends_in_the_address(launcher: Launcher) -> None:
    assert f"open http://127.0.0.1:{launcher.port}/ " in launcher.lines[-1]
    assert len(launcher.lines) <= 5
    (log,) = [word for word in launcher.lines[0].split() if word.endswith(".log)")]
    assert "| flownet2 " in Path(log.rstrip(")")).read_text()  # Triton's table of models


@pytest.mark.parametrize(
    "victim", ["tritonserver", "triton_python_backend_stub", "gateway", "deep JSON"]
)
def test_what_dies_comes_back(launcher: Launcher, victim: str) -> None:
    assert is_flow_right(launcher)
    if victim == "deep JSON":  # ends tritonserver 2.51 in a stack overflow
        infer = f"http://127.0.0.1:{launcher.http}/v2/models/flownet2/infer"
        with pytest.raises(OSError, match=r"closed|reset"):
            urllib.request.urlopen(infer, b"[" * 300_000)
    elif victim == "gateway":
        (gateway,) = (
            group for group in launcher.groups() if "tritonserver" not in processes_of_group(group)
        )
        os.kill(gateway, signal.SIGKILL)
    else:
        os.kill(launcher.processes()[victim], signal.SIGKILL)
    wait_until(lambda: not is_flow_right(launcher))
    wait_until(lambda: is_flow_right(launcher))
    assert launcher.said("starting it again")


def test_another_model_is_taken_in_under_load(tmp_path: Path) -> None:
    write_model(tmp_path)
    code = tmp_path / "flownet2" / "1" / "model.py"
    right = code.read_text()
    old, new = (expected_flow(*IMAGES) * factor for factor in (1, 2))
    pair = {f"image{i}": encoded(image) for i, image in enumerate(IMAGES, 1)}
    asking = threading.Event()
    seen: Counter[str] = Counter()

    def ask(launcher: Launcher) -> None:
        with httpx2.Client(headers={"Accept": "application/x-npy"}, timeout=60) as client:
            while asking.is_set():
                response = client.post(f"{launcher.url}/estimate_flow/", files=pair)
                if response.status_code != 200:
                    seen[response.text] += 1
                    continue
                flow = np.load(io.BytesIO(response.content))
                known = {"old": old, "new": new}
                same = (name for name in known if np.allclose(flow, known[name], atol=1e-4))
                seen[next(same, "wrong")] += 1

    def replace(text: str) -> None:
        code.unlink()  # was a link
        code.write_text(text)
        assert request_reload(launcher.port).returncode == 0

    launcher = Launcher(tmp_path)
    try:
        asking.set()
        with ThreadPoolExecutor(4) as clients:
            running = [clients.submit(ask, launcher) for _ in range(4)]
            try:
                wait_until(lambda: seen["old"] > 20)
                replace("a model that does not load")
                wait_until(lambda: launcher.said("warning: not loaded again: flownet2: "))
                before = seen["old"]
                wait_until(lambda: seen["old"] > before + 20)
                replace(right.replace("/ 8", "/ 4"))
                wait_until(lambda: launcher.said("has loaded the models again"))
                wait_until(lambda: seen["new"] > 20)
            finally:
                asking.clear()
            for client in running:
                client.result()
        assert seen.keys() == {"old", "new"}
    finally:
        launcher.stop(signal.SIGTERM)


def request_reload(port: int) -> subprocess.CompletedProcess[str]:
    """Run what `make reload` runs."""
    return subprocess.run(
        [sys.executable, "-m", "launch.state"],
        cwd=PROJECT,
        env={**os.environ, "PORT": str(port)},
        capture_output=True,
        text=True,
        check=False,
    )


def test_reload_signals_no_process_but_the_service(launcher: Launcher) -> None:
    """Not even one with the process id in a file that a killed service has left."""
    (port,) = free_ports(1)
    file = state.folder() / f"serve-{port}.pid"
    with subprocess.Popen(["/bin/sleep", "60"]) as other:
        try:
            for content in (str(other.pid), "", "1 2"):
                file.write_text(content)
                asked = request_reload(port)
                assert asked.returncode == 1
                assert asked.stderr.startswith(
                    f"error: no service of this checkout runs on port {port}"
                )
            assert other.poll() is None
        finally:
            file.unlink()
            other.kill()
    assert request_reload(launcher.port).returncode == 0
    wait_until(lambda: launcher.said("has loaded the models again"))


def test_start_with_the_environment_of_cron_and_a_log_folder(
    repository: Path, tmp_path: Path
) -> None:
    """PATH names another Python of this version, HOME is not set, the checkout is read-only."""
    other = tmp_path / "bin" / "python3"
    other.parent.mkdir()
    other.write_text("#!/bin/sh\nexit 1\n")
    other.chmod(0o755)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    (tmp_path / "lib" / version).mkdir(parents=True)
    (tmp_path / "lib" / version / "os.py").touch()  # its standard library, by which Python knows it
    log = tmp_path / "logs é"
    running = Launcher(
        repository,
        "env", "-u", "HOME", "-u", "LD_LIBRARY_PATH", "-u", "LANG",
        PATH=f"{other.parent}:/usr/bin:/bin",
        LC_ALL="C",
        LOG_DIR=str(log),
    )  # fmt: skip
    assert is_flow_right(running)
    assert running.said(str(log / f"serve-{running.port}.log"))
    assert running.stop(signal.SIGTERM) == 0
    assert (log / f"serve-{running.port}.log").stat().st_size > 0


def test_log_folder_of_a_read_only_checkout(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(state, "BUILD", tmp_path / "file" / "build")  # also for root not writable
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert state.folder() == tmp_path / f"flownet2-{os.getuid()}"
    monkeypatch.setenv("LOG_DIR", str(tmp_path / "file"))
    with pytest.raises(LaunchError, match=r"LOG_DIR=.* is not writable"):
        state.folder()


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="this machine has no IPv6")
def test_host_may_be_an_ipv6_address(repository: Path) -> None:
    running = Launcher(repository, HOST="::")
    running.url = f"http://[::1]:{running.port}"
    assert running.said(f"open {running.url}/ ")
    assert is_flow_right(running)
    check = [sys.executable, "-m", "launch.check"]
    environment = {**os.environ, "HOST": "::1", "TRITON_HTTP_PORT": str(running.http)}
    subprocess.run(check, cwd=PROJECT, env=environment, check=True)
    assert running.stop(signal.SIGTERM) == 0


def is_flow_right(launcher: Launcher) -> bool:
    """Return True if the service answers; its answer must be correct."""
    request = urllib.request.Request(
        f"{launcher.url}/estimate_flow/",
        json.dumps(as_json(*map(encoded, IMAGES))).encode(),
        {"Accept": "application/x-npy", "Content-Type": "application/json"},
    )
    try:
        with urllib.request.urlopen(request) as response:
            flow = np.load(io.BytesIO(response.read()))
    except urllib.error.HTTPError as error:
        with error:
            refusal = (error.status, error.headers["Retry-After"])
        assert refusal == (503, "1")
        return False
    except (OSError, http.client.HTTPException):  # the gateway is away
        return False
    np.testing.assert_allclose(flow, expected_flow(*IMAGES), atol=1e-4)
    return True


def test_two_copies_run_side_by_side_until_ctrl_c(launcher: Launcher, repository: Path) -> None:
    other = Launcher(repository, VERBOSE="1")
    assert answers_ok("127.0.0.1", other.port, "/readyz")
    groups = other.groups()
    assert {"tritonserver", "triton_python_backend_stub"} <= set(other.processes())
    assert {"triton", "gateway"} <= {line.partition(" ")[0] for line in other.lines}
    assert other.stop(signal.SIGINT) == 0
    assert not any(map(processes_of_group, groups))
    check_free("127.0.0.1", {str(port): port for port in other.ports})
    assert answers_ok("127.0.0.1", launcher.port, "/readyz")


def test_nohup_keeps_it_running_until_sigterm(repository: Path) -> None:
    running = Launcher(repository, "nohup")
    groups = running.groups()
    status = Path(f"/proc/{running.process.pid}/status").read_text()
    (ignored,) = (line.split()[1] for line in status.splitlines() if line.startswith("SigIgn"))
    assert int(ignored, 16) & 1 << signal.SIGHUP - 1
    assert running.stop(signal.SIGTERM) == 0
    assert not any(map(processes_of_group, groups))


def test_children_end_when_the_launcher_is_killed(repository: Path) -> None:
    running = Launcher(repository)
    groups = running.groups()
    running.stop(signal.SIGKILL)
    wait_until(lambda: not any(map(processes_of_group, groups)))

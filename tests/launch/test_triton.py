"""The launcher: a real tritonserver and gateway as children, and what it says when it cannot."""

import http.server
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from launch import triton
from launch.child import Child
from launch.errors import (
    BadSetting,
    ModelMissing,
    PortUnavailable,
    ServerMissing,
    SharedLibraryMissing,
    StartFailed,
    StubMissing,
)
from launch.ports import check_free, free_ports, host_from_environment
from tests.support.gateway_stack import write_model

PROJECT = Path(__file__).parents[2]


def processes_of_group(group: int) -> list[str]:
    """Commands of all processes, zombies apart, that belong to a process group."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            head, _, tail = stat.read_text().rpartition(")")
        except (FileNotFoundError, ProcessLookupError):
            continue
        state, _, process_group = tail.split()[:3]
        if int(process_group) == group and state != "Z":
            found.append(head.partition("(")[2])
    return found


def wait_for(condition: object, seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline, "the condition never came true"
        time.sleep(0.05)


class Launcher:
    """`python -m launch` over a repository, on ports of its own."""

    def __init__(self, repository: Path, *prefix: str, **environment: str) -> None:
        self.port, http, grpc, metrics = free_ports(4)
        self.process = subprocess.Popen(
            [*prefix, sys.executable, "-m", "launch"],
            cwd=PROJECT,
            env={
                **os.environ,
                "MODEL_REPOSITORY": str(repository),
                "PORT": str(self.port),
                "TRITON_HTTP_PORT": str(http),
                "TRITON_GRPC_PORT": str(grpc),
                "TRITON_METRICS_PORT": str(metrics),
                **environment,
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.ports = (self.port, http, grpc, metrics)
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        for line in self.process.stdout or ():
            self.lines.append(line)

    def wait_until_ready(self) -> None:
        wait_for(lambda: self.said("ready on http") or self.process.poll() is not None, 120)
        assert self.process.poll() is None, self.process.stderr.read()  # type: ignore[union-attr]

    def said(self, words: str) -> bool:
        return any(words in line for line in self.lines)

    def groups(self) -> list[int]:
        """Process groups of the children: each leads its own."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        return [int(child) for child in children.split()]

    def stop(self, number: int) -> int:
        self.process.send_signal(number)
        status = self.process.wait(timeout=60)
        self._reader.join(timeout=10)
        for stream in (self.process.stdout, self.process.stderr):
            assert stream is not None
            stream.close()
        return status


@pytest.fixture
def launcher(closed_form_repository: Path) -> Iterator[Launcher]:
    running = Launcher(closed_form_repository)
    running.wait_until_ready()
    yield running
    if running.process.poll() is None:
        running.stop(signal.SIGTERM)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_stops_both_children_and_leaves_no_process(
    launcher: Launcher, number: signal.Signals
) -> None:
    groups = launcher.groups()
    names = [name for group in groups for name in processes_of_group(group)]
    assert len(groups) == 2
    assert {"tritonserver", "triton_python_b"} <= set(names)  # names are cut to 15 letters
    assert launcher.stop(number) == 0
    assert [processes_of_group(group) for group in groups] == [[], []]
    check_free("127.0.0.1", {str(port): port for port in launcher.ports})


def test_logs_say_who_speaks(launcher: Launcher) -> None:
    assert {line.partition(" ")[0] for line in launcher.lines if line.strip()} == {
        "triton",
        "gateway",
        "launch",
    }


def test_two_copies_run_side_by_side(launcher: Launcher, closed_form_repository: Path) -> None:
    other = Launcher(closed_form_repository)
    try:
        other.wait_until_ready()
        for port in (launcher.port, other.port):
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz") as answer:
                assert answer.status == 200
    finally:
        other.stop(signal.SIGINT)
    assert triton.answers_ok("127.0.0.1", launcher.port, "/readyz")


def test_nohup_keeps_it_running(closed_form_repository: Path) -> None:
    running = Launcher(closed_form_repository, "nohup")
    running.wait_until_ready()
    running.process.send_signal(signal.SIGHUP)
    with pytest.raises(subprocess.TimeoutExpired):
        running.process.wait(timeout=2)
    assert running.stop(signal.SIGTERM) == 0


def test_children_end_when_the_launcher_is_killed(launcher: Launcher) -> None:
    groups = launcher.groups()
    launcher.stop(signal.SIGKILL)
    wait_for(lambda: not any(processes_of_group(group) for group in groups))


def test_one_child_that_dies_ends_the_other(launcher: Launcher) -> None:
    groups = launcher.groups()
    server = next(group for group in groups if "tritonserver" in processes_of_group(group))
    os.killpg(server, signal.SIGKILL)
    assert launcher.process.wait(timeout=60) == 1
    assert launcher.process.stderr is not None
    assert "error: triton ended by itself with exit status -9" in launcher.process.stderr.read()
    assert [processes_of_group(group) for group in groups] == [[], []]
    launcher.stop(signal.SIGTERM)


def run_launch(environment: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "launch"],
        cwd=PROJECT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize(
    "variable", ["PORT", "TRITON_HTTP_PORT", "TRITON_GRPC_PORT", "TRITON_METRICS_PORT"]
)
def test_taken_port_is_named_with_its_variable(closed_form_repository: Path, variable: str) -> None:
    names = ("PORT", "TRITON_HTTP_PORT", "TRITON_GRPC_PORT", "TRITON_METRICS_PORT")
    ports = dict(zip(names, free_ports(4), strict=True))
    with socket.create_server(("127.0.0.1", ports[variable])):
        result = run_launch(
            {
                "MODEL_REPOSITORY": str(closed_form_repository),
                **{name: str(port) for name, port in ports.items()},
            }
        )
    assert result.returncode == 1
    assert result.stderr == (
        f"error: port {ports[variable]} on 127.0.0.1 is taken: stop the program that listens "
        f"there, or set {variable} to a free port\n"
    )


@pytest.mark.parametrize("port", ["0", "65536", "-1", "http", "8000.0", "²"])
def test_port_that_is_none_is_refused(port: str) -> None:
    result = run_launch({"TRITON_GRPC_PORT": port})
    assert result.returncode == 1
    assert result.stderr.startswith(f"error: TRITON_GRPC_PORT={port} is not a port")


def test_missing_model_names_the_command_that_makes_it(tmp_path: Path) -> None:
    with pytest.raises(ModelMissing, match="`make model` writes it"), triton.serve(tmp_path):
        pass


def test_configuration_without_its_model_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "flownet2").mkdir()
    (tmp_path / "flownet2" / "config.pbtxt").write_text('name: "flownet2"')
    with pytest.raises(ModelMissing, match=r"flownet2/1/model\.onnx is missing"):
        triton.check_repository(tmp_path)


def test_same_port_twice_names_both_variables() -> None:
    (port,) = free_ports(1)
    with pytest.raises(PortUnavailable, match="PORT and TRITON_HTTP_PORT are both"):
        check_free("127.0.0.1", {"PORT": port, "TRITON_HTTP_PORT": port})


def test_address_of_another_machine_is_refused() -> None:
    with pytest.raises(BadSetting, match=r"HOST=192\.0\.2\.1 cannot be listened on"):
        check_free("192.0.2.1", {"PORT": free_ports(1)[0]})


def test_host_may_be_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOST", "localhost")
    assert triton.Address.from_environment().host == "127.0.0.1"
    monkeypatch.setenv("HOST", "")
    assert host_from_environment("HOST", "0.0.0.0") == "0.0.0.0"


@pytest.mark.parametrize("host", ["::1", "[::]", "no.such.host.invalid", "a..b"])
def test_host_without_an_ipv4_address_is_refused(host: str) -> None:
    result = run_launch({"HOST": host})
    assert result.returncode == 1
    assert result.stderr.startswith(f"error: HOST={host} is not an IPv4 address")
    assert result.stderr.count("\n") == 1


def test_own_servers_are_asked_without_a_proxy(closed_form_triton: triton.Triton) -> None:
    address = closed_form_triton.address
    code = f"from launch.triton import answers_ok as ok; ok({address.host!r}, {address.http_port}, "
    code += "'/v2/health/ready') or exit('no answer')"
    nobody = f"http://127.0.0.1:{free_ports(1)[0]}"
    environment = {**os.environ, "http_proxy": nobody, "no_proxy": ""}
    subprocess.run([sys.executable, "-c", code], cwd=PROJECT, env=environment, check=True)


def test_path_of_the_models_may_hold_a_space(tmp_path: Path) -> None:
    """Triton's Python backend gives it to a shell."""
    repository = tmp_path / "a b; exit 1"
    write_model(repository)
    with triton.serve(repository) as server:
        assert triton.is_ready(server.address)


def test_folder_for_temporary_files_may_hold_none(
    closed_form_repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "a b"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    with (
        pytest.raises(BadSetting, match=r"TMPDIR=.*a b has a space"),
        triton.serve(closed_form_repository),
    ):
        pass


def test_missing_wheel_names_the_package(
    closed_form_repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with (
        pytest.raises(ServerMissing, match=r"pip install --no-deps nvidia-pytriton"),
        triton.serve(closed_form_repository),
    ):
        pass


def wheel_with_stub(folder: Path, script: str) -> Path:
    """A stand-in for the wheel's folder whose stub for this Python is a shell script."""
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    stub = folder / "python_backend_stubs" / version / "triton_python_backend_stub"
    stub.parent.mkdir(parents=True)
    stub.write_text(f"#!/bin/sh\n{script}\n")
    stub.chmod(0o755)
    return folder


def test_python_without_stub_names_those_that_have_one(tmp_path: Path) -> None:
    for version in ("3.9", "3.10"):
        (tmp_path / "python_backend_stubs" / version).mkdir(parents=True)
    with pytest.raises(StubMissing, match=r"one of Python 3\.9, 3\.10"):
        triton._stub(tmp_path, {})


def test_missing_libpython_names_its_package(tmp_path: Path) -> None:
    wheel = wheel_with_stub(
        tmp_path,
        "echo 'stub: error while loading shared libraries: libpython3.12.so.1.0: "
        "cannot open shared object file: No such file or directory' >&2; exit 127",
    )
    with pytest.raises(SharedLibraryMissing, match=r"Debian package libpython3\.12 "):
        triton._stub(wheel, {})


def test_loader_reports_a_library_that_really_is_missing(tmp_path: Path) -> None:
    """The words looked for are those of this machine's loader."""
    wheel = triton._wheel()
    stubs = wheel / "python_backend_stubs"
    environment = {"PATH": os.environ["PATH"]}
    missing = [
        stub
        for stub in stubs.glob("3.*/triton_python_backend_stub")
        if "not found"
        in subprocess.run(
            ["ldd", stub], capture_output=True, text=True, env=environment, check=True
        ).stdout
    ]
    if not missing:
        pytest.skip("this machine has libpython for every stub of the wheel")
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    stub = tmp_path / "python_backend_stubs" / version / "triton_python_backend_stub"
    stub.parent.mkdir(parents=True)
    stub.symlink_to(missing[0])
    with pytest.raises(SharedLibraryMissing, match=f"libpython{missing[0].parent.name}"):
        triton._stub(tmp_path, environment)


def test_model_that_fails_to_load_gives_its_reason(tmp_path: Path) -> None:
    version = tmp_path / "broken" / "1"
    version.mkdir(parents=True)
    (version / "model.py").write_text("raise RuntimeError('no such weights')\n")
    (version.parent / "config.pbtxt").write_text(
        'name: "broken" backend: "python" max_batch_size: 1\n'
        'input { name: "a" data_type: TYPE_FP32 dims: 1 }\n'
        'output { name: "b" data_type: TYPE_FP32 dims: 1 }\n'
        "instance_group { kind: KIND_CPU }\n"
    )
    with pytest.raises(StartFailed, match="no such weights"), triton.serve(tmp_path):
        pass


def test_wheel_stays_as_it_is(closed_form_triton: triton.Triton) -> None:
    """The stub is beside the backend in a folder of the launcher, not in site-packages."""
    assert closed_form_triton.child.exit_status() is None
    backend = triton._wheel() / "backends" / "python"
    assert not (backend / "triton_python_backend_stub").exists()


def test_admin_endpoints_are_closed(closed_form_triton: triton.Triton) -> None:
    base = f"http://{closed_form_triton.address.http}/v2"
    for path, body in {
        "logging": {"log_verbose_level": 9},
        "trace/setting": {"trace_level": ["TIMESTAMPS"]},
        "systemsharedmemory/region/x/register": {"key": "/x", "offset": 0, "byte_size": 1},
        "repository/models/flownet2/unload": {},
    }.items():
        request = urllib.request.Request(f"{base}/{path}", json.dumps(body).encode())
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(request)
        with refused.value as answer:
            assert answer.status in {403, 503}, path  # 503: what --model-control-mode forbids
    assert triton.is_ready(closed_form_triton.address)


def test_metrics_are_served(closed_form_triton: triton.Triton) -> None:
    with urllib.request.urlopen(closed_form_triton.address.metrics) as answer:
        assert "nv_inference_count" in answer.read().decode()


def test_child_that_ignores_sigterm_is_killed_with_its_own_children() -> None:
    said: list[str] = []
    script = "trap '' TERM; sleep 600 & echo up; while :; do sleep 1; done"
    child = Child("stubborn", ["/bin/sh", "-c", script], os.environ, said.append)
    wait_for(lambda: "up" in said)
    child.stop(grace=0.3)
    assert child.exit_status() == -signal.SIGKILL
    assert processes_of_group(child.pid) == []
    assert said[-1] == "stubborn: still running after 0 s, killed"


def test_child_that_is_never_ready_times_out() -> None:
    child = Child("slow", ["/bin/sh", "-c", "echo loading; sleep 600"], os.environ, lambda _: None)
    try:
        with pytest.raises(StartFailed, match=r"slow was not ready within 1 s: loading"):
            child.wait_until(lambda: False, 1.0, threading.Event())
    finally:
        child.kill()


def test_crash_of_what_a_child_started_ends_the_wait() -> None:
    script = "echo 'terminate called after throwing an instance of std::x'; echo; sleep 600"
    child = Child("broken", ["/bin/sh", "-c", script], os.environ, lambda _: None)
    try:
        with pytest.raises(StartFailed, match="broken crashed before it was ready: terminate"):
            child.wait_until(lambda: False, 60.0, threading.Event())
    finally:
        child.kill()


def test_stop_ends_the_wait_for_readiness() -> None:
    stop = threading.Event()
    stop.set()
    child = Child("slow", ["/bin/sleep", "600"], os.environ, lambda _: None)
    try:
        assert child.wait_until(lambda: False, 60.0, stop) is False
    finally:
        child.kill()


def test_spans_of_triton_join_the_callers_trace(
    closed_form_repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bodies: list[bytes] = []

    class Collector(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            bodies.append(self.rfile.read(int(self.headers["Content-Length"])))
            assert self.path == "/v1/traces"
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    trace = "0af7651916cd43dd8448eb211c80319c"
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Collector) as collector:
        threading.Thread(target=collector.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{collector.server_port}"
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", url)
        with triton.serve(closed_form_repository) as server:
            image = {"shape": [1, 16, 16, 3], "datatype": "UINT8", "data": [0] * 16 * 16 * 3}
            body = {"inputs": [{"name": name, **image} for name in ("image1", "image2")]}
            request = urllib.request.Request(
                f"http://{server.address.http}/v2/models/flownet2/infer",
                json.dumps(body).encode(),
                {"traceparent": f"00-{trace}-b7ad6b7169203331-01"},
            )
            urllib.request.urlopen(request).close()
        # Spans that are still waiting are sent when the server stops.
        wait_for(lambda: any(trace.encode() in one for one in bodies))
        collector.shutdown()

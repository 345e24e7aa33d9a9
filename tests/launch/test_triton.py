"""The launcher: a real tritonserver and gateway as children, and what it says when it cannot."""

import http.server
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Mapping
from pathlib import Path

import pytest

from launch import triton, wheel
from launch.errors import LaunchError
from launch.ports import check_free, free_ports
from tests.support.gateway_stack import wait_until, write_model

PROJECT = Path(__file__).parents[2]


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
        f"error: port {ports[variable]} on 127.0.0.1 is in use: stop the program that listens "
        f"there, or set {variable} to a free port\n"
    )


@pytest.mark.parametrize("port", ["0", "65536", "-1", "http", "8000.0", "²"])
def test_port_that_is_none_is_refused(port: str) -> None:
    result = run_launch({"TRITON_GRPC_PORT": port})
    assert result.returncode == 1
    assert result.stderr.startswith(f"error: TRITON_GRPC_PORT={port} is not a port")


def test_missing_model_names_the_command_that_makes_it(tmp_path: Path) -> None:
    with pytest.raises(LaunchError, match="`make model` writes it"), wheel.serve(tmp_path):
        pass


def test_configuration_without_its_model_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "flownet2").mkdir()
    (tmp_path / "flownet2" / "config.pbtxt").write_text('name: "flownet2"')
    with pytest.raises(LaunchError, match=r"flownet2/1/model\.onnx is missing"):
        triton.check_repository(tmp_path)


def test_same_port_twice_names_both_variables() -> None:
    (port,) = free_ports(1)
    with pytest.raises(LaunchError, match="PORT and TRITON_HTTP_PORT are both"):
        check_free("127.0.0.1", {"PORT": port, "TRITON_HTTP_PORT": port})


def test_address_of_another_machine_is_refused() -> None:
    with pytest.raises(LaunchError, match=r"HOST=192\.0\.2\.1 is not an address"):
        check_free("192.0.2.1", {"PORT": free_ports(1)[0]})


def test_host_may_be_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOST", "localhost")
    assert triton.Address.from_environment().host == "127.0.0.1"
    monkeypatch.setenv("HOST", "")
    assert triton.Address.from_environment().host == "127.0.0.1"


@pytest.mark.parametrize(
    "host", ["x86_64-conda-linux-gnu", "no.such.host.invalid", "a..b", "[:::]"]
)
def test_host_that_does_not_resolve_is_ignored(
    host: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOST", host)
    assert triton.Address.from_environment().host == "127.0.0.1"
    assert f"warning: HOST={host} is neither" in capsys.readouterr().err


def test_own_servers_are_asked_without_a_proxy(closed_form_triton: triton.Triton) -> None:
    address = closed_form_triton.address
    code = f"from launch.check import answers_ok as ok; ok({address.host!r}, {address.http_port}, "
    code += "'/v2/health/ready') or exit('no response')"
    nobody = f"http://127.0.0.1:{free_ports(1)[0]}"
    environment = {**os.environ, "http_proxy": nobody, "no_proxy": ""}
    subprocess.run([sys.executable, "-c", code], cwd=PROJECT, env=environment, check=True)


def test_path_of_the_models_may_hold_a_space(tmp_path: Path) -> None:
    """Triton's Python backend passes the path to a shell."""
    repository = tmp_path / "a b; exit 1"
    write_model(repository)
    with wheel.serve(repository) as server:
        assert triton.is_ready(server.address)


def test_folder_for_temporary_files_may_hold_none(
    closed_form_repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "a b"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    with (
        pytest.raises(LaunchError, match=r"TMPDIR=.*a b has a space"),
        wheel.serve(closed_form_repository),
    ):
        pass


def test_missing_wheel_names_the_package(
    closed_form_repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with (
        pytest.raises(LaunchError, match=r"pip install --no-deps nvidia-pytriton"),
        wheel.serve(closed_form_repository),
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
    with pytest.raises(LaunchError, match=r"with Python 3\.9, 3\.10"):
        wheel.find_stub(tmp_path, {})


def test_missing_libpython_names_its_package(tmp_path: Path) -> None:
    stand_in = wheel_with_stub(
        tmp_path,
        "echo 'stub: error while loading shared libraries: libpython3.12.so.1.0: "
        "cannot open shared object file: No such file or directory' >&2; exit 127",
    )
    with pytest.raises(LaunchError, match=r"Debian package libpython3\.12 "):
        wheel.find_stub(stand_in, {})


def test_loader_reports_a_library_that_really_is_missing(tmp_path: Path) -> None:
    """The expected words are those of this machine's loader."""
    stubs = wheel.find_wheel() / "python_backend_stubs"
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
    with pytest.raises(LaunchError, match=f"libpython{missing[0].parent.name}"):
        wheel.find_stub(tmp_path, environment)


def write_broken_model(repository: Path) -> None:
    version = repository / "broken" / "1"
    version.mkdir(parents=True)
    (version / "model.py").write_text("raise RuntimeError('no such weights')\n")
    (version.parent / "config.pbtxt").write_text(
        'name: "broken" backend: "python" max_batch_size: 1\n'
        'input { name: "a" data_type: TYPE_FP32 dims: 1 }\n'
        'output { name: "b" data_type: TYPE_FP32 dims: 1 }\n'
        "instance_group { kind: KIND_CPU }\n"
    )


def test_only_model_that_fails_to_load_gives_its_reason(tmp_path: Path) -> None:
    write_broken_model(tmp_path)
    with pytest.raises(LaunchError, match="no such weights"), wheel.serve(tmp_path):
        pass


def test_a_model_that_fails_to_load_leaves_the_others_served(tmp_path: Path) -> None:
    write_broken_model(tmp_path)
    write_model(tmp_path)
    said: list[str] = []
    with wheel.serve(tmp_path, say=said.append) as server:
        assert triton.serves(server.address, "flownet2")
        assert not triton.serves(server.address, "broken")
        (line,) = said
        assert line.startswith("warning: the model broken is not served: ")
        assert "no such weights" in line
        with pytest.raises(LaunchError, match=r"not loaded again: broken: .*no such weights"):
            server.reload()
        # Repaired, it is served after a reload.
        shutil.rmtree(tmp_path / "broken")
        write_model(tmp_path, "broken")
        server.reload()
        assert triton.serves(server.address, "broken")


def test_wheel_stays_as_it_is(closed_form_triton: triton.Triton) -> None:
    """The stub is beside the backend in a folder of the launcher, not in site-packages."""
    assert closed_form_triton.child.exit_status() is None
    backend = wheel.find_wheel() / "backends" / "python"
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
        with refused.value as response:
            assert response.status == 403, path
    assert triton.is_ready(closed_form_triton.address)


def test_who_has_the_key_may_load_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_model(tmp_path / "models")
    key = tmp_path / "key"
    key.write_text("a key of words\n")
    monkeypatch.setenv("TRITON_ADMIN_KEY_FILE", str(key))
    with pytest.raises(LaunchError, match="holds no key"), wheel.serve(tmp_path / "models"):
        pass
    key.write_text("0123456789abcdef\n")
    with wheel.serve(tmp_path / "models") as server:
        url = f"http://{server.address.http}/v2/repository"
        headers = {"admin-key": "0123456789abcdef"}
        index = urllib.request.Request(f"{url}/index", b"{}", headers)
        with urllib.request.urlopen(index) as response:
            assert [entry["state"] for entry in json.load(response)] == ["READY"]
        load = urllib.request.Request(f"{url}/models/flownet2/load", b"{}", headers)
        urllib.request.urlopen(load).close()
        region = tmp_path.name
        regions = f"http://{server.address.http}/v2/systemsharedmemory"
        (Path("/dev/shm") / region).write_bytes(b"0000")
        try:
            where = json.dumps({"key": f"/{region}", "offset": 0, "byte_size": 4}).encode()
            register = f"{regions}/region/{region}/register"
            urllib.request.urlopen(urllib.request.Request(register, where, headers)).close()
            status = urllib.request.Request(f"{regions}/status", headers=headers)
            with urllib.request.urlopen(status) as response:
                assert [entry["name"] for entry in json.load(response)] == [region]
        finally:
            (Path("/dev/shm") / region).unlink()


def test_metrics_are_served(closed_form_triton: triton.Triton) -> None:
    with urllib.request.urlopen(closed_form_triton.address.metrics) as response:
        assert "nv_inference_count" in response.read().decode()


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
        with wheel.serve(closed_form_repository) as server:
            image = {"shape": [1, 16, 16, 3], "datatype": "UINT8", "data": [0] * 16 * 16 * 3}
            body = {"inputs": [{"name": name, **image} for name in ("image1", "image2")]}
            request = urllib.request.Request(
                f"http://{server.address.http}/v2/models/flownet2/infer",
                json.dumps(body).encode(),
                {"traceparent": f"00-{trace}-b7ad6b7169203331-01"},
            )
            urllib.request.urlopen(request).close()
        # Spans that are still waiting are sent when the server stops.
        wait_until(lambda: any(trace.encode() in body for body in bodies))
        collector.shutdown()

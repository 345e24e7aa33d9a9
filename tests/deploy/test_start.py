"""What the image of Triton runs at its start, with a real tritonserver."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from export import tensorrt
from launch import container, triton
from launch.check import answers_ok
from launch.errors import LaunchError
from launch.ports import free_ports
from tests.support.gateway_stack import wait_until

ROOT = Path(__file__).parents[2]


def make_model(source: Path, name: str, content: str = "graph") -> Path:
    """A model's folder as the exporter writes it, as far as the start looks at it."""
    model = source / name
    for file in ("config.pbtxt", "configs/cpu.pbtxt", "1/model.onnx", "1/model.py"):
        (model / file).parent.mkdir(parents=True, exist_ok=True)
        (model / file).write_text(content)
    return model


def contents(repository: Path) -> dict[str, str]:
    return {
        str(file.relative_to(repository)): file.read_text()
        for file in repository.rglob("*")
        if file.is_file()
    }


def test_the_repository_holds_the_models_of_all_sources(tmp_path: Path) -> None:
    shipped, exported = tmp_path / "shipped", tmp_path / "exported"
    make_model(shipped, "flownet2", "shipped")
    make_model(exported, "flownet2_css", "exported")
    repository = tmp_path / "engines" / "models"
    assert container.assemble(repository, [shipped, exported]) == ["flownet2", "flownet2_css"]
    found = contents(repository)
    assert found["flownet2/1/model.onnx"] == "shipped"
    assert found["flownet2_css/configs/cpu.pbtxt"] == "exported"
    assert len(found) == 8


def test_an_exported_model_takes_the_place_of_the_shipped_one(tmp_path: Path) -> None:
    shipped, exported = tmp_path / "shipped", tmp_path / "exported"
    make_model(shipped, "flownet2", "shipped")
    repository = tmp_path / "repository"
    container.assemble(repository, [shipped, exported])  # the volume is empty at first
    (repository / "flownet2" / "1" / "model.plan").write_text("engine")
    make_model(exported, "flownet2", "exported")
    container.assemble(repository, [shipped, exported])
    found = contents(repository)
    assert found["flownet2/1/model.onnx"] == "exported"
    assert found["flownet2/1/model.plan"] == "engine", "its builder says whether it still fits"

    for file in exported.rglob("*.*"):
        file.unlink()
    container.assemble(repository, [shipped, exported])
    assert contents(repository)["flownet2/1/model.onnx"] == "shipped"


def test_models_that_are_gone_are_not_served(tmp_path: Path) -> None:
    shipped, repository = tmp_path / "shipped", tmp_path / "repository"
    make_model(shipped, "flownet2")
    make_model(repository, "old")
    assert container.assemble(repository, [shipped]) == ["flownet2"]
    assert [one.name for one in repository.iterdir()] == ["flownet2"]
    (repository / "stray").write_text("no folder")
    (repository / "link").symlink_to(shipped)
    assert container.assemble(repository, [shipped]) == ["flownet2"]
    assert [one.name for one in repository.iterdir()] == ["flownet2"]
    assert (shipped / "flownet2" / "1" / "model.onnx").is_file()
    # The builder's own links, beside the engine, stay.
    version = repository / "flownet2" / "1"
    (version / "A100.plan").write_text("engine")
    (version / "model.plan").symlink_to("A100.plan")
    container.assemble(repository, [shipped])
    assert (version / "model.plan").read_text() == "engine"


def test_a_library_that_does_not_load_is_told_with_the_reason() -> None:
    assert container.why_not_loading("libm.so.6") is None
    reason = container.why_not_loading("libflownet2_missing.so")
    assert reason is not None
    assert "libflownet2_missing.so" in reason


GPU = tensorrt.Gpu("a GPU", 2**30)


def no_gpu() -> tensorrt.Gpu:
    raise tensorrt.NoGpu("no CUDA driver")


@pytest.mark.parametrize(
    ("find_gpu", "broken", "built", "configuration", "said"),
    [
        (no_gpu, (), {}, "cpu", "no GPU: no CUDA driver"),
        (lambda: GPU, (), {"a": True, "b": True}, "tensorrt", "GPU: a GPU"),
        (lambda: GPU, (), {"a": True, "b": False}, "onnx", "no engine for b"),
        (lambda: GPU, (tensorrt.PLUGIN,), {}, "onnx", f"{tensorrt.PLUGIN} does not load"),
    ],
    ids=["no GPU", "engines", "no engine", "no plugin"],
)
def test_the_fastest_configuration_that_works_is_chosen(
    find_gpu: Callable[[], tensorrt.Gpu],
    broken: tuple[str, ...],
    built: dict[str, bool],
    configuration: str,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(tensorrt, "find_gpu", find_gpu)
    monkeypatch.setattr(
        container, "why_not_loading", lambda library: "broken" if library in broken else None
    )
    monkeypatch.setattr(container, "build_engine", lambda repository, name: built[name])
    assert container.choose_configuration(tmp_path, ["a", "b"]) == configuration
    assert said in capsys.readouterr().out


def test_without_the_op_a_gpu_cannot_serve(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tensorrt, "find_gpu", lambda: GPU)
    with pytest.raises(LaunchError, match=r"libflownet2_onnxruntime\.so does not load"):
        container.choose_configuration(tmp_path, ["flownet2"])


def test_an_engine_that_cannot_be_built_is_told_and_not_fatal(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert not container.build_engine(tmp_path, "flownet2")
    assert "there is no ONNX file" in capfd.readouterr().err


# With tritonserver -----------------------------------------------------------------------------


class Start:
    """`python -m launch.container` as in the image, its tritonserver that of the wheel."""

    def __init__(self, folder: Path, *sources: Path, **environment: str) -> None:
        self.http, grpc, metrics = free_ports(3)
        self.log = folder / "log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "launch.container", folder / "engines" / "models", *sources],
                cwd=ROOT,
                env={
                    **os.environ,
                    "HOST": "127.0.0.1",
                    "TRITON_HTTP_PORT": str(self.http),
                    "TRITON_GRPC_PORT": str(grpc),
                    "TRITON_METRICS_PORT": str(metrics),
                    **environment,
                },
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def get(self, path: str) -> bool:
        return answers_ok("127.0.0.1", self.http, path)


def write_tritonserver(folder: Path) -> str:
    """A PATH with a tritonserver in front that finds the wheel's backends, as the image's does."""
    wheel = triton._wheel()
    environment = triton._environment(wheel)
    backends = triton._backends(wheel, triton._stub(wheel, environment), folder)
    script = folder / "tritonserver"
    script.write_text(
        "#!/bin/sh\n"
        f"export LD_LIBRARY_PATH='{environment['LD_LIBRARY_PATH']}'\n"
        f"export PYTHONPATH='{environment['PYTHONPATH']}'\n"
        f"exec '{wheel}/bin/tritonserver' \"$@\" '--backend-directory={backends}'\n"
    )
    script.chmod(0o755)
    return f"{folder}{os.pathsep}{os.environ['PATH']}"


def test_it_serves_and_stops(tmp_path: Path, closed_form_repository: Path) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "flownet2").symlink_to(closed_form_repository / "flownet2")
    path = write_tritonserver(tmp_path)
    start = Start(tmp_path, tmp_path / "source", tmp_path / "models", PATH=path)
    try:
        deadline = time.monotonic() + 120
        while not start.get("/v2/health/ready"):
            assert start.process.poll() is None, start.log.read_text()
            assert time.monotonic() < deadline, start.log.read_text()
            time.sleep(0.1)
        assert start.get("/v2/models/flownet2/ready")
        (server,) = psutil.Process(start.process.pid).children()
        assert server.name() == "tritonserver"
        assert {"--model-config-name=cpu", "--model-control-mode=none"} <= set(server.cmdline())
        log = start.log.read_text()
        assert "start: serving flownet2 with the cpu configuration" in log
        server.kill()
        wait_until(lambda: "starting it again" in start.log.read_text())
        wait_until(lambda: start.get("/v2/health/ready"))
        start.process.send_signal(signal.SIGTERM)
        assert start.process.wait(60) == 0
    finally:
        start.process.kill()
        start.process.wait()


def test_nothing_to_serve_is_one_line(tmp_path: Path) -> None:
    start = Start(tmp_path, tmp_path / "nowhere")
    assert start.process.wait(60) == 1
    (line,) = start.log.read_text().splitlines()
    assert line.startswith("error: ")
    assert "model.onnx is missing" in line


def test_a_port_that_is_none_is_one_line(tmp_path: Path) -> None:
    start = Start(tmp_path, tmp_path / "nowhere", TRITON_GRPC_PORT="http")
    assert start.process.wait(60) == 1
    assert "TRITON_GRPC_PORT=http is not a port" in start.log.read_text()


def test_a_stop_ends_the_build_of_an_engine(tmp_path: Path) -> None:
    # The first process of a container gets no signal that it does not handle; here a build hangs.
    make_model(tmp_path / "source", "flownet2")
    code = (
        "import subprocess, sys\n"
        "from launch import container\n"
        "hang = [sys.executable, '-c', 'import time; print(0, flush=True); time.sleep(600)']\n"
        "container.choose_configuration = lambda *_: subprocess.run(hang)\n"
        f"container.main(['{tmp_path}/repository', '{tmp_path}/source'])"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"0\n"
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        (child,) = children.read_text().split()
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 128 + signal.SIGTERM
        assert not Path(f"/proc/{child}").exists()

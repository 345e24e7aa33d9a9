"""The start program of Triton's image, with a real tritonserver."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from export.engine.gpu import EngineError, Gpu
from export.repository import TEMPLATE
from launch import container, wheel
from launch.check import answers_ok
from launch.child import Child
from launch.ports import free_ports
from launch.repository import assemble
from launch.triton import local_address
from tests.support.gateway_stack import wait_until

ROOT = Path(__file__).parents[2]


def make_model(source: Path, name: str, content: str = "graph") -> Path:
    """Make a model's folder with the exporter's files that the start program reads."""
    model = source / name
    for file in ("config.pbtxt", "configs/gpu.pbtxt", "1/model.onnx", "1/model.py"):
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
    assert assemble(repository, [shipped, exported]) == ["flownet2", "flownet2_css"]
    found = contents(repository)
    assert found["flownet2/1/model.onnx"] == "shipped"
    assert found["flownet2_css/configs/gpu.pbtxt"] == "exported"
    assert len(found) == 8


def test_an_exported_model_takes_the_place_of_the_shipped_one(tmp_path: Path) -> None:
    shipped, exported = tmp_path / "shipped", tmp_path / "exported"
    make_model(shipped, "flownet2", "shipped")
    repository = tmp_path / "repository"
    assemble(repository, [shipped, exported])  # the volume is empty at first
    (repository / "flownet2" / "1" / "model.plan").write_text("engine")
    make_model(exported, "flownet2", "exported")
    assemble(repository, [shipped, exported])
    found = contents(repository)
    assert found["flownet2/1/model.onnx"] == "exported"
    assert found["flownet2/1/model.plan"] == "engine", "its builder says whether it still fits"

    for file in exported.rglob("*.*"):
        file.unlink()
    assemble(repository, [shipped, exported])
    assert contents(repository)["flownet2/1/model.onnx"] == "shipped"


def test_models_that_are_gone_are_not_served(tmp_path: Path) -> None:
    shipped, repository = tmp_path / "shipped", tmp_path / "repository"
    make_model(shipped, "flownet2")
    make_model(repository, "old")
    assert assemble(repository, [shipped]) == ["flownet2"]
    assert [path.name for path in repository.iterdir()] == ["flownet2"]
    (repository / "stray").write_text("no folder")
    (repository / "link").symlink_to(shipped)
    assert assemble(repository, [shipped]) == ["flownet2"]
    assert [path.name for path in repository.iterdir()] == ["flownet2"]
    assert (shipped / "flownet2" / "1" / "model.onnx").is_file()
    # The builder's own links, beside the engine, stay.
    version = repository / "flownet2" / "1"
    (version / "A100.plan").write_text("engine")
    (version / "model.plan").symlink_to("A100.plan")
    assemble(repository, [shipped])
    assert (version / "model.plan").read_text() == "engine"


def test_the_served_configurations_have_the_description(tmp_path: Path) -> None:
    model = make_model(tmp_path / "source", "flownet2", "backend\n")
    (model / "1" / "description.pbtxt").write_text("parameters\n")
    assemble(tmp_path / "repository", [tmp_path / "source"])
    found = contents(tmp_path / "repository")
    assert found["flownet2/config.pbtxt"] == found["flownet2/configs/gpu.pbtxt"]
    assert found["flownet2/config.pbtxt"] == "backend\nparameters\n"
    assert found["flownet2/1/model.py"] == "backend\n"
    assert (model / "config.pbtxt").read_text() == "backend\n"


GPU = Gpu("a GPU", (8, 9))


@pytest.mark.parametrize(
    ("plugin", "built", "expected", "said"),
    [
        ("libm.so.6", {"a": True, "b": True}, ["tensorrt", "python"], "GPU: a GPU"),
        ("libm.so.6", {"a": True, "b": False}, ["python"], "no engine for b"),
        ("libmissing.so", {}, ["python"], "libmissing.so does not load"),
    ],
    ids=["engines", "no engine", "no plugin"],
)
def test_a_gpu_gets_the_fastest_configuration_that_may_work(
    plugin: str,
    built: dict[str, bool],
    expected: list[str],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(container, "find_gpu", lambda: GPU)
    monkeypatch.setattr(container, "PLUGIN", plugin)
    monkeypatch.setattr(container, "build_engine", lambda repository, name, stop: built[name])
    assert container.configurations(tmp_path, ["a", "b"], threading.Event()) == expected
    assert said in capsys.readouterr().out


def test_without_a_fit_gpu_the_cpu_serves(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def find_gpu() -> Gpu:
        raise EngineError("a GPU has compute capability 7.0, and 7.5 is needed")

    monkeypatch.setattr(container, "find_gpu", find_gpu)
    assert container.configurations(tmp_path, ["flownet2"], threading.Event()) == ["cpu"]
    (line,) = capsys.readouterr().out.splitlines()
    assert line == "start: serving on the CPU: a GPU has compute capability 7.0, and 7.5 is needed"


def test_an_engine_that_cannot_be_built_is_told_and_not_fatal(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert not container.build_engine(tmp_path, "flownet2", threading.Event())
    assert "model.onnx is missing" in capfd.readouterr().err


def test_after_a_reload_a_model_without_a_right_engine_is_served_as_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`sleep` stands in for Triton, and the engines are fakes: correct for `a`, wrong for `b`."""
    for name in ("a", "b"):
        make_model(tmp_path / "source", name)
    loaded: list[str] = []

    @contextlib.contextmanager
    def run(command: object, *_: object) -> Iterator[Child]:
        child = Child("Triton", ["/bin/sleep", "60"], os.environ, lambda line: None)
        yield child
        child.kill()

    stop, changed = threading.Event(), threading.Event()
    monkeypatch.setattr(container, "run", run)
    monkeypatch.setattr(container, "options", lambda *_, **options: [])
    monkeypatch.setattr(container, "report", lambda *_: None)
    monkeypatch.setattr(container, "engines", lambda address: [])
    monkeypatch.setattr(container, "build_engine", lambda repository, name, stop: name == "a")
    monkeypatch.setattr(container, "load", lambda models, *_: (loaded.extend(models), stop.set()))
    changed.set()
    sources = [tmp_path / "source"]
    assert container.serve(
        tmp_path / "models", sources, local_address(), "tensorrt", None, stop, changed
    )
    assert loaded == ["a"]
    assert "warning: no engine for b: served as before" in capsys.readouterr().out


# With tritonserver -----------------------------------------------------------------------------


class Start:
    """`python -m launch.container` as in the image, its tritonserver that of the wheel."""

    def __init__(
        self,
        folder: Path,
        *sources: Path,
        program: tuple[str, str] = ("-m", "launch.container"),
        **environment: str,
    ) -> None:
        self.http, grpc, metrics = free_ports(3)
        self.log = folder / "log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, *program, folder / "engines" / "models", *sources],
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
    program = wheel.find_wheel()
    environment = wheel.server_environment(program, folder, None)
    backends = wheel.link_backends(program, wheel.find_stub(program, environment), folder)
    script = folder / "tritonserver"
    script.write_text(
        "#!/bin/sh\n"
        f"export LD_LIBRARY_PATH='{environment['LD_LIBRARY_PATH']}'\n"
        f"export PYTHONPATH='{environment['PYTHONPATH']}' PATH='{environment['PATH']}'\n"
        f"exec '{program}/bin/tritonserver' \"$@\" '--backend-directory={backends}'\n"
    )
    script.chmod(0o755)
    return f"{folder}{os.pathsep}{os.environ['PATH']}"


# As if there were a GPU and an engine: the wheel's tritonserver has no TensorRT backend, and ends.
CANDIDATES = """
import sys
from launch import container
container.configurations = lambda *_: ["tensorrt", "python"]
sys.exit(container.main(sys.argv[1:]))
"""


def test_it_serves_with_the_next_configuration_where_one_fails_and_stops(
    tmp_path: Path, closed_form_repository: Path
) -> None:
    shutil.copytree(closed_form_repository / "flownet2", tmp_path / "source" / "flownet2")
    shutil.copytree(TEMPLATE / "configs", tmp_path / "source" / "flownet2" / "configs")
    path = write_tritonserver(tmp_path)
    start = Start(
        tmp_path, tmp_path / "source", tmp_path / "models", program=("-c", CANDIDATES), PATH=path
    )
    try:
        deadline = time.monotonic() + 120
        while not start.get("/v2/health/ready"):
            assert start.process.poll() is None, start.log.read_text()
            assert time.monotonic() < deadline, start.log.read_text()
            time.sleep(0.1)
        assert start.get("/v2/models/flownet2/ready")
        (server,) = psutil.Process(start.process.pid).children()
        assert server.name() == "tritonserver"
        log = start.log.read_text()
        assert "warning: TensorRT is not used: Triton ended" in log
        assert "start: serving flownet2 with the python configuration" in log
        wait_until(lambda: "start: ready with the python configuration" in start.log.read_text())
        start.process.send_signal(signal.SIGUSR1)
        wait_until(lambda: "start: loaded flownet2 again" in start.log.read_text())
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
    hang = tmp_path / "hang"
    hang.write_text("#!/bin/sh\necho 0\nexec sleep 600\n")
    hang.chmod(0o755)
    code = (
        "import sys, types\n"
        "from launch import container\n"
        f"sys.executable = '{hang}'\n"
        "container._say = lambda text: None\n"
        "container.find_gpu = lambda: types.SimpleNamespace(name='a GPU')\n"
        "container.PLUGIN = 'libm.so.6'\n"
        f"sys.exit(container.main(['{tmp_path}/repository', '{tmp_path}/source']))"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"0\n"
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        (child,) = children.read_text().split()
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
        assert not Path(f"/proc/{child}").exists()

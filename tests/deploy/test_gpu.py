"""The GPU's start on a stand-in for one: a driver, TensorRT, and ONNX Runtime's CPU provider.

The rest is real: tritonserver, the model, its check against the golden pair, and the gateway.
"""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from flownet2 import Client, read_flow
from launch import gpu
from launch.errors import LaunchError
from tests.deploy.test_start import Start, write_tritonserver
from tests.support.gateway_stack import wait_until
from tests.support.launcher import Launcher
from tests.support.plugins_build import needs, run

ROOT = Path(__file__).parents[2]
SUPPORT = ROOT / "tests" / "support"
SAMPLE = ROOT / "samples" / "layers_0"


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> str:
    """LD_LIBRARY_PATH with a driver, and a plugin library for TensorRT."""
    needs("cc")
    folder = tmp_path_factory.mktemp("libraries")
    run("cc", "-shared", "-fPIC", SUPPORT / "libcuda.c", "-o", folder / "libcuda.so.1")
    run("cc", "-shared", "-fPIC", "-x", "c", "/dev/null", "-o", folder / "libflownet2_tensorrt.so")
    return str(folder)


def export_tensorrt(
    models: Path, libraries: str, **environment: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "export", "tensorrt", "--repository", models],
        cwd=ROOT,
        env={
            **os.environ,
            "LD_LIBRARY_PATH": libraries,
            "PYTHONPATH": str(SUPPORT / "standins"),
            **environment,
        },
        capture_output=True,
        text=True,
        check=False,
    )


def test_plan_is_used_only_if_it_reproduces_the_golden_pair(
    shipped: Path, libraries: str, tmp_path: Path
) -> None:
    models = shutil.copytree(shipped, tmp_path / "models")
    link = models / "flownet2" / "1" / "model.plan"
    for _ in range(2):  # built, and found
        wrong = export_tensorrt(models, libraries, FAKE_TENSORRT_ERROR="0.3")
        assert wrong.returncode == 1
        assert "its flow of the golden pair differs by 0.42" in wrong.stderr.splitlines()[-1]
        assert not link.is_symlink()
    right = export_tensorrt(models, libraries, FAKE_TENSORRT_ERROR="0.01")
    assert right.returncode == 0, right.stderr
    assert "its flow of the golden pair differs by 0.01" in right.stderr
    assert link.resolve().is_file()


def test_wrong_plan_makes_the_container_serve_with_the_python_backend(
    shipped: Path, libraries: str, tmp_path: Path
) -> None:
    start = Start(
        tmp_path,
        shipped,
        PATH=write_tritonserver(tmp_path),
        LD_LIBRARY_PATH=libraries,
        PYTHONPATH=str(SUPPORT / "standins"),
        FAKE_TENSORRT_ERROR="0.3",
        FLOWNET2_ONNXRUNTIME_PROVIDER="CPUExecutionProvider",
    )
    try:
        ready = "start: ready with the python configuration"
        wait_until(lambda: start.process.poll() is not None or ready in start.log.read_text(), 120)
        log = start.log.read_text()
        assert ready in log
        assert "start: GPU: NVIDIA Fake" in log
        assert "differs by 0.42" in log
        assert "start: warning: TensorRT is not used: no engine for flownet2" in log
        assert "start: flownet2: ONNX Runtime" in log
        start.process.send_signal(signal.SIGTERM)
        assert start.process.wait(60) == 0
    finally:
        start.process.kill()
        start.process.wait()


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Installed packages for the GPU: the environment's own."""
    folder = tmp_path / "gpu"
    folder.mkdir()
    (folder / gpu.REQUIREMENTS.name).write_bytes(gpu.REQUIREMENTS.read_bytes())
    monkeypatch.setenv("FLOWNET2_GPU_PACKAGES", str(folder))
    return folder


@pytest.mark.usefixtures("packages")
def test_service_on_a_gpu(shipped: Path, libraries: str) -> None:
    launcher = Launcher(
        shipped,
        LD_LIBRARY_PATH=libraries,
        FLOWNET2_ONNXRUNTIME_PROVIDER="CPUExecutionProvider",
    )
    try:
        assert launcher.said("GPU: NVIDIA Fake\n")
        assert launcher.said("flownet2: ONNX Runtime ")
        with Client(launcher.url) as client:
            flow = client.flow(SAMPLE / "frame0.png", SAMPLE / "frame1.png").flow
        truth = read_flow(SAMPLE / "gt.flo")
        error = np.linalg.norm(flow - truth, axis=-1).mean()
        assert error < 0.5 * np.linalg.norm(truth, axis=-1).mean()
    finally:
        assert launcher.stop(signal.SIGTERM) == 0


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({}, ""),
        ({"DEVICE": "cpu"}, ""),
        ({"FAKE_CAPABILITY": "70"}, "warning: the CPU serves: NVIDIA Fake has compute capability"),
        ({"FAKE_DRIVER": "12090"}, "warning: the CPU serves: the driver of NVIDIA Fake supports"),
        ({"FAKE_STATUS": "100"}, "warning: the CPU serves: no GPU"),
    ],
    ids=["fits", "DEVICE", "old GPU", "old driver", "no GPU"],
)
def test_a_gpu_is_used_only_if_it_fits(
    libraries: str, environment: dict[str, str], said: str
) -> None:
    code = "from launch.gpu import usable_gpu as find; gpu = find(print); print(gpu and gpu.name)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, "LD_LIBRARY_PATH": libraries, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    *warnings, used = done.stdout.splitlines()
    assert used == ("None" if environment else "NVIDIA Fake")
    assert len(warnings) == bool(said)
    assert done.stdout.startswith(said)


def test_unknown_device_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEVICE", "tpu")
    with pytest.raises(LaunchError, match="DEVICE=tpu is not known: set it to cpu"):
        gpu.usable_gpu(pytest.fail)


def test_installation_is_done_once_and_its_failure_is_a_warning(
    libraries: str, tmp_path: Path
) -> None:
    """With a stand-in for pip: the packages are 1.6 GB."""
    (tmp_path / "pip").mkdir()
    (tmp_path / "pip" / "__main__.py").write_text(
        "import os, pathlib, sys\n"
        "if os.environ.get('FAIL'): sys.exit('no such package')\n"
        "target = pathlib.Path(sys.argv[sys.argv.index('--target') + 1])\n"
        "target.mkdir()\n"
        "(target / 'installed').touch()\n"
    )
    (tmp_path / "pip" / "__init__.py").touch()
    folder = tmp_path / "gpu"

    def install(**environment: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "launch.gpu"],
            cwd=ROOT,
            env={
                **os.environ,
                "LD_LIBRARY_PATH": libraries,
                "PYTHONPATH": str(tmp_path),
                "FLOWNET2_GPU_PACKAGES": str(folder),
                **environment,
            },
            capture_output=True,
            text=True,
            check=True,
        )
        return done.stdout + done.stderr

    assert install(DEVICE="cpu") == ""
    assert "no such package\nwarning: the CPU serves: pip" in install(FAIL="1")
    assert not folder.exists()
    assert install().startswith("NVIDIA Fake: installing ONNX Runtime with CUDA and cuDNN")
    assert (folder / "installed").exists()
    assert install() == ""
    (folder / gpu.REQUIREMENTS.name).write_text("onnxruntime-gpu==1.0\n")
    assert "installing" in install()

"""`python -m launch.container REPOSITORY MODELS…`: what the image of Triton runs.

It puts the served repository together, builds TensorRT engines where there is a GPU, chooses the
models' configuration, and then keeps tritonserver running. Until that is ready nothing listens, so
the probes of Triton and the gateway's `/readyz` fail while an engine is built.
"""

import ctypes
import functools
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

from export import tensorrt
from export.repository import ONNX_OP_LIBRARY
from launch.check import Canary
from launch.errors import LaunchError
from launch.supervisor import Supervisor
from launch.triton import Address, check_repository, options, run

CPU, ONNX, TENSORRT = "cpu", "onnx", "tensorrt"  # files of `<model>/configs/`


def main(arguments: list[str]) -> int:
    """Serve until SIGTERM or SIGINT; 1 when Triton cannot start or is given up."""
    if len(arguments) < 2:
        print("usage: python -m launch.container REPOSITORY MODELS…", file=sys.stderr)
        return 2
    # The first process of a container ignores signals that it does not handle.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    repository = Path(arguments[0])
    try:
        address = Address.from_environment()
        models = assemble(repository, [Path(folder) for folder in arguments[1:]])
        check_repository(repository)
        configuration = choose_configuration(repository, models)
        _say(f"serving {', '.join(models)} with the {configuration} configuration")
        command = ["tritonserver", *options(repository, address, configuration)]
        if configuration == TENSORRT:
            command.append(f"--backend-config=tensorrt,plugins={tensorrt.PLUGIN}")
        stop = threading.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: stop.set())
        canary = Canary(address.host, address.http_port)
        start = functools.partial(run, command, os.environ, address, _print)
        with Supervisor(start, canary.fault, _say) as server:
            while not stop.wait(0.2):
                server.ready()
    except LaunchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def assemble(repository: Path, sources: list[Path]) -> list[str]:
    """Make `repository` hold the models of `sources`, by links; of two of one name the last.

    The sources stay as they are, and may be read-only. What else is in a model's folder, such as
    its engines, stays; folders of models that no source has any more are removed.

    Returns:
        The models' names.
    """
    models: dict[str, Path] = {}
    for source in sources:
        for config in sorted(source.glob("*/config.pbtxt")):
            models[config.parent.name] = config.parent
    repository.mkdir(parents=True, exist_ok=True)
    for found in repository.iterdir():
        if not found.is_dir() or found.is_symlink():
            found.unlink()
        elif found.name not in models:
            shutil.rmtree(found)
    for name, model in models.items():
        for link in (repository / name).rglob("*"):
            # Of an earlier start, maybe to another source; the engines' builder may link its own.
            if link.is_symlink() and not link.resolve().is_relative_to(repository.resolve()):
                link.unlink()
        for file in model.rglob("*"):
            if file.is_file():
                link = repository / name / file.relative_to(model)
                link.parent.mkdir(parents=True, exist_ok=True)
                link.unlink(missing_ok=True)
                link.symlink_to(file.absolute())
    return sorted(models)


def choose_configuration(repository: Path, models: list[str]) -> str:
    """The fastest configuration that this machine can serve, after building what it needs.

    Raises:
        LaunchError: there is a GPU, and the ONNX Runtime op does not load.
    """
    try:
        _say(f"GPU: {tensorrt.find_gpu().name}")
    except tensorrt.NoGpu as error:
        _say(str(error))
        return CPU
    trouble = why_not_loading(ONNX_OP_LIBRARY)
    if trouble:
        raise LaunchError(f"{ONNX_OP_LIBRARY} does not load, build the image anew: {trouble}")
    trouble = why_not_loading(tensorrt.PLUGIN)
    if trouble:  # Triton would log it, and then fail on the engine
        _say(f"warning: TensorRT is not used: {tensorrt.PLUGIN} does not load: {trouble}")
        return ONNX
    for name in models:
        if not build_engine(repository, name):
            _say(f"warning: TensorRT is not used: no engine for {name}, the reason stands above")
            return ONNX
    return TENSORRT


def why_not_loading(library: str) -> str | None:
    """None for a shared library that loads with all that it needs, else the loader's message."""
    try:
        ctypes.CDLL(library)
    except OSError as error:
        return str(error)
    return None


def build_engine(repository: Path, name: str) -> bool:
    """Build a model's engine for this GPU, unless a fitting one is there; False if it failed.

    In a process of its own: TensorRT's memory is free again before Triton starts, and a crash of
    the builder costs the engine alone.
    """
    _say(f"TensorRT engine of {name}")
    command = [sys.executable, "-m", "export", "tensorrt"]
    command += ["--repository", str(repository), "--name", name]
    return subprocess.run(command, check=False).returncode == 0  # noqa: S603


def _say(text: str) -> None:
    _print(f"start: {text}")


def _print(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

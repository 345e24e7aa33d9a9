"""`python -m launch.container [--gateway] REPOSITORY MODELS…`: the program of Triton's image.

It fills the served repository with links to the models, and keeps tritonserver running with the
fastest configuration that works: TensorRT, whose engines it builds and checks first, then the
Python backend, which runs ONNX Runtime on a GPU and OpenVINO on the CPU. With `--gateway` it also
runs the gateway (on PORT). Nothing listens until Triton is ready, so the probes and the gateway's
`/readyz` fail while an engine is built. On SIGUSR1 it loads the models of MODELS again, without a
restart.
"""

import contextlib
import ctypes
import functools
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

from export.engine.build import PLUGIN
from export.engine.gpu import EngineError, find_gpu
from flownet2.errors import Error
from launch import gateway
from launch.check import HealthCheck
from launch.child import Child
from launch.errors import LaunchError
from launch.ports import port_from_environment
from launch.repository import assemble
from launch.supervisor import Supervisor
from launch.triton import (
    Address,
    admin_key,
    check_repository,
    engines,
    load,
    options,
    reload_when,
    report,
    run,
)

# TENSORRT is a file of `<model>/configs/`; the others use `config.pbtxt`, with and without a GPU.
TENSORRT, PYTHON, CPU = "tensorrt", "python", "cpu"


def main(arguments: list[str]) -> int:
    """Serve until SIGTERM or SIGINT; return 1 if Triton cannot start or is given up."""
    with_gateway = arguments[:1] == ["--gateway"]
    arguments = arguments[with_gateway:]
    if len(arguments) < 2:
        print("usage: python -m launch.container [--gateway] REPOSITORY MODELS…", file=sys.stderr)
        return 2
    stop, changed = threading.Event(), threading.Event()
    # As the first process of a container, it gets only the signals that it handles.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    signal.signal(signal.SIGUSR1, lambda *_: changed.set())
    repository, sources = Path(arguments[0]), [Path(folder) for folder in arguments[1:]]
    try:
        address = Address.from_environment()
        port = port_from_environment("PORT", 5003) if with_gateway else None
        models = assemble(repository, sources)
        check_repository(repository)
        for configuration in configurations(repository, models, stop):
            _say(f"serving {', '.join(models)} with the {configuration} configuration")
            if serve(repository, sources, address, configuration, port, stop, changed):
                return 0
    except (Error, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def configurations(repository: Path, models: list[str], stop: threading.Event) -> list[str]:
    """Return the configurations that may work on this machine, fastest first.

    The list is empty if `stop` ended the build of an engine.
    """
    if os.environ.get("DEVICE", "").lower() == "cpu":
        return [CPU]
    try:
        gpu = find_gpu()
    except EngineError as error:
        _say(f"serving on the CPU: {error}")
        return [CPU]
    _say(f"GPU: {gpu.name}")
    try:
        ctypes.CDLL(PLUGIN)
    except OSError as error:  # Triton would log it, and then fail on the engine
        _say(f"warning: TensorRT is not used: {PLUGIN} does not load: {error}")
        return [PYTHON]
    for name in models:
        if not build_engine(repository, name, stop):
            if stop.is_set():
                return []
            _say(f"warning: TensorRT is not used: no engine for {name}, for the reason above")
            return [PYTHON]
    return [TENSORRT, PYTHON]


def build_engine(repository: Path, name: str, stop: threading.Event) -> bool:
    """Build a model's engine for this GPU unless there is one, and check its flow.

    The build runs in its own process, so that TensorRT's memory is freed before Triton starts and a
    crash costs only the engine.

    Returns:
        False if the engine was not built, returned a wrong flow, or `stop` ended the build.
    """
    _say(f"TensorRT engine of {name}")
    command = [sys.executable, "-m", "export", "tensorrt"]
    command += ["--repository", str(repository), "--name", name]
    with subprocess.Popen(command) as build:  # noqa: S603
        while build.poll() is None and not stop.wait(0.2):
            pass
        build.kill()
    return build.returncode == 0


def serve(
    repository: Path,
    sources: list[Path],
    address: Address,
    configuration: str,
    port: int | None,
    stop: threading.Event,
    changed: threading.Event,
) -> bool:
    """Keep tritonserver running until `stop`; return False if it does not start with TensorRT.

    Args:
        repository: folder of models that Triton reads.
        sources: folders that the models come from.
        address: host and ports on which it listens.
        configuration: TENSORRT, PYTHON or CPU.
        port: port of the gateway, which starts when Triton is ready; None for no gateway.
        stop: event that ends it.
        changed: when set, the models are loaded again.

    Raises:
        LaunchError: Triton does not start, or Triton or the gateway is given up.
    """
    key = admin_key()
    environment = dict(os.environ)
    if configuration == CPU:
        environment["CUDA_VISIBLE_DEVICES"] = ""  # Triton itself must not use an unfit GPU
    name = TENSORRT if configuration == TENSORRT else None
    program = "tritonserver"
    command = [program, *options(program, environment, repository, address, key, config_name=name)]
    if configuration == TENSORRT:
        command.append(f"--backend-config=tensorrt,plugins={PLUGIN}")

    def reload() -> None:
        models = assemble(repository, sources)
        check_repository(repository)
        failed = [
            name
            for name in (models if configuration == TENSORRT else [])
            if not build_engine(repository, name, stop)
        ]
        load([name for name in models if name not in failed], address, key)
        if failed:
            raise LaunchError(f"no engine for {', '.join(failed)}: served as before")
        for line in engines(address):
            _say(line)
        _say(f"loaded {', '.join(models)} again")

    @contextlib.contextmanager
    def start(stop: threading.Event) -> Iterator[Child]:
        with run(command, environment, address, _print, stop) as child:
            if not stop.is_set():
                report(address, key, _say)
            yield child

    health = HealthCheck(address.host, address.http_port)
    ready = False
    try:
        with Supervisor(start, health.fault, _say) as triton, contextlib.ExitStack() as stack:
            servers = [triton]
            while not stop.wait(0.2):
                if all([server.ready() for server in servers]) and not ready:
                    ready = True
                    _say(f"ready with the {configuration} configuration")
                    if port is not None:
                        servers.append(stack.enter_context(_gateway(address, port)))
                if ready:
                    reload_when(changed, reload, _say)
    except LaunchError as error:
        if ready or configuration != TENSORRT:
            raise
        _say(f"warning: TensorRT is not used: {error}")
        return False
    return True


def _gateway(address: Address, port: int) -> Supervisor:
    def start(stop: threading.Event) -> contextlib.AbstractContextManager[Child]:
        return gateway.serve(address, port, echo=_print, stop=stop)

    return Supervisor(start, functools.partial(gateway.fault, address.host, port), _say)


def _say(text: str) -> None:
    _print(f"start: {text}")


def _print(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

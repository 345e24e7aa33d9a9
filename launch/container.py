"""`python -m launch.container [--gateway] REPOSITORY MODELS…`: what the image of Triton runs.

It puts the served repository together and keeps tritonserver running with the fastest configuration
that works: TensorRT, whose engines it builds first, then ONNX Runtime, then the CPU; and the
gateway (on PORT) if told to. Until Triton is ready nothing listens, so its probes and the gateway's
`/readyz` fail while an engine is built. SIGUSR1 has it serve what MODELS hold by then, without a
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
from pathlib import Path

from export.engine.build import PLUGIN
from export.engine.gpu import EngineError, find_gpu
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
    load,
    options,
    reload_when,
    run,
)

# Files of `<model>/configs/`; for the CPU there is none, and Triton takes `config.pbtxt`.
CPU, ONNX, TENSORRT = "cpu", "onnx", "tensorrt"


def main(arguments: list[str]) -> int:
    """Serve until SIGTERM or SIGINT; 1 when Triton cannot start or is given up."""
    with_gateway = arguments[:1] == ["--gateway"]
    arguments = arguments[with_gateway:]
    if len(arguments) < 2:
        print("usage: python -m launch.container [--gateway] REPOSITORY MODELS…", file=sys.stderr)
        return 2
    stop, changed = threading.Event(), threading.Event()
    # The first process of a container ignores signals that it does not handle.
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
    except LaunchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def configurations(repository: Path, models: list[str], stop: threading.Event) -> list[str]:
    """The configurations that may work on this machine, the fastest first and the CPU's
    last; none where `stop` ended the build of an engine."""
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
        return [ONNX, CPU]
    for name in models:
        if not build_engine(repository, name, stop):
            if stop.is_set():
                return []
            _say(f"warning: TensorRT is not used: no engine for {name}, the reason stands above")
            return [ONNX, CPU]
    return [TENSORRT, ONNX, CPU]


def build_engine(repository: Path, name: str, stop: threading.Event) -> bool:
    """Build a model's engine for this GPU, unless a fitting one is there; False if it failed, or if
    `stop` ended it.

    In a process of its own: TensorRT's memory is free again before Triton starts, and a crash of
    the builder costs the engine alone.
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
    """Keep tritonserver running until `stop`; False if it does not start and another may.

    Args:
        repository: what Triton reads.
        sources: where its models come from.
        address: where it listens.
        configuration: CPU, ONNX or TENSORRT.
        port: of the gateway, if there is to be one; it starts when Triton is ready.
        stop: set from elsewhere, ends it.
        changed: set from elsewhere, says that the sources hold other models.

    Raises:
        LaunchError: Triton does not start on the CPU, or one of the two is given up.
    """
    key = admin_key()
    command = ["tritonserver", *options(repository, address, configuration, key)]
    environment = dict(os.environ)
    if configuration == TENSORRT:
        command.append(f"--backend-config=tensorrt,plugins={PLUGIN}")
    if configuration == CPU:
        environment["CUDA_VISIBLE_DEVICES"] = ""  # Triton, too, shall leave an unfit GPU alone

    def reload() -> None:
        models = assemble(repository, sources)
        check_repository(repository)
        for name in models if configuration == TENSORRT else []:
            if not build_engine(repository, name, stop):
                raise LaunchError(f"no engine for {name}, it stays as it was")
        load(models, address, key)
        _say(f"loaded {', '.join(models)} again")

    health = HealthCheck(address.host, address.http_port)
    start = functools.partial(run, command, environment, address, _print)
    ready = False
    try:
        with Supervisor(start, health.fault, _say) as server, contextlib.ExitStack() as stack:
            servers = [server]
            while not stop.wait(0.2):
                if all([one.ready() for one in servers]) and not ready:
                    ready = True
                    _say(f"ready with the {configuration} configuration")
                    if port is not None:
                        servers.append(stack.enter_context(_gateway(address, port)))
                if ready:
                    reload_when(changed, reload, _say)
    except LaunchError as error:
        if ready or configuration == CPU:
            raise
        _say(f"warning: the {configuration} configuration is not used: {error}")
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

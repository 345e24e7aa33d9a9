"""`python -m launch.container [--gateway] REPOSITORY MODELS…`: what the image of Triton runs.

It puts the served repository together, builds TensorRT engines where there is a GPU, chooses the
models' configuration, and then keeps tritonserver running, and the gateway (on PORT) if told to.
Until that is ready nothing listens, so the probes of Triton and the gateway's `/readyz` fail while
an engine is built.
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

from export import tensorrt
from launch import gateway
from launch.check import Canary
from launch.child import Child
from launch.errors import LaunchError
from launch.ports import port_from_environment
from launch.repository import assemble
from launch.supervisor import Supervisor
from launch.triton import Address, check_repository, options, run

# Files of `<model>/configs/`; for the CPU there is none, and Triton takes `config.pbtxt`.
CPU, ONNX, TENSORRT = "cpu", "onnx", "tensorrt"

ONNX_OP_LIBRARY = "libflownet2_onnxruntime.so"  # named in `onnx.pbtxt`; the loader finds it


def main(arguments: list[str]) -> int:
    """Serve until SIGTERM or SIGINT; 1 when Triton cannot start or is given up."""
    with_gateway = arguments[:1] == ["--gateway"]
    arguments = arguments[with_gateway:]
    if len(arguments) < 2:
        print("usage: python -m launch.container [--gateway] REPOSITORY MODELS…", file=sys.stderr)
        return 2
    # The first process of a container ignores signals that it does not handle.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    repository = Path(arguments[0])
    try:
        address = Address.from_environment()
        port = port_from_environment("PORT", 5003)
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
        start_gateway = functools.partial(_start_gateway, address, port)
        answers = functools.partial(gateway.fault, address.host, port)
        with Supervisor(start, canary.fault, _say) as server, contextlib.ExitStack() as stack:
            servers = [server]
            while not stop.wait(0.2):
                if all(one.ready() for one in servers) and with_gateway and len(servers) == 1:
                    service = Supervisor(start_gateway, answers, _say)
                    servers.append(stack.enter_context(service))
    except LaunchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _start_gateway(
    address: Address, port: int, stop: threading.Event
) -> contextlib.AbstractContextManager[Child]:
    return gateway.serve(address, port, echo=_print, stop=stop)


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

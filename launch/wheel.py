"""The tritonserver of the `nvidia-pytriton` wheel: its files, environment and command line.

Only the wheel's binaries are used: server, Python backend, and one Python stub for each Python
version. They serve a plain model repository, as in NVIDIA's container.
"""

import contextlib
import importlib.util
import os
import re
import shlex
import subprocess
import sys
import sysconfig
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from launch.child import Echo
from launch.errors import LaunchError
from launch.ports import check_free
from launch.repository import assemble
from launch.triton import (
    Address,
    Triton,
    admin_key,
    check_repository,
    engines,
    load,
    local_address,
    options,
    report,
    run,
)

PLUGINS = Path(__file__).parent.parent / "build" / "plugins"  # output folder of `make plugins`


@contextlib.contextmanager
def serve(
    repository: Path,
    *,
    address: Address | None = None,
    gpu_packages: Path | None = None,
    echo: Echo = lambda line: None,
    say: Echo = lambda line: None,
    stop: threading.Event | None = None,
) -> Iterator[Triton]:
    """Run the wheel's tritonserver over a model repository.

    It is ready when the block begins and stopped after it. A warning names models that cannot be
    loaded; the others are served.

    Args:
        repository: folder of model folders.
        address: host and ports on which it listens; free ports of 127.0.0.1 if None.
        gpu_packages: folder with the Python packages that a GPU needs; None hides the GPUs.
        echo: receives the server's log lines.
        say: receives warnings, and the engine of each model.
        stop: when set, ends the wait for readiness early.

    Raises:
        LaunchError: the server cannot start, or can load no model.
    """
    address = address or local_address()
    check_repository(repository)
    check_free(address.host, address.ports)
    wheel = find_wheel()
    with tempfile.TemporaryDirectory(prefix="flownet2-triton-") as name:
        folder = Path(name)
        # The Python backend passes its own path and those of models to a shell without quotes.
        if shlex.quote(name) != name:
            raise LaunchError(
                f"TMPDIR={tempfile.gettempdir()} has a space or another character that a "
                "shell misreads: set it to a folder without one, such as /tmp"
            )
        server = server_environment(wheel, folder, gpu_packages)
        backends = link_backends(wheel, find_stub(wheel, server), folder)
        models = folder / "models"
        assemble(models, [repository.resolve()])
        key = admin_key()
        program = wheel / "bin" / "tritonserver"
        command: list[str | Path] = [
            program,
            *options(program, server, models, address, key),
            f"--backend-directory={backends}",
            "--allow-gpu-metrics=false",
        ]

        def reload() -> None:
            check_repository(repository)
            load(assemble(models, [repository.resolve()]), address, key)
            for line in engines(address):
                say(line)

        stop = stop or threading.Event()
        with run(command, server, address, echo, stop) as child:
            if not stop.is_set():
                report(address, key, say)
            yield Triton(address, child, reload)


def find_wheel() -> Path:
    """Return the wheel's folder with the server, its backends and stubs.

    Raises:
        LaunchError: the wheel is not installed.
    """
    package = importlib.util.find_spec("pytriton")
    folder = Path(package.origin).parent / "tritonserver" if package and package.origin else None
    if folder is None or not (folder / "bin" / "tritonserver").is_file():
        raise LaunchError(
            "tritonserver is not installed in this Python environment: "
            "`pip install --no-deps nvidia-pytriton==0.7.0` (x86-64 and arm64 Linux only)"
        )
    return folder


def wheel_libraries() -> Path:
    """Return the folder of the shared libraries that the wheel brings for tritonserver."""
    return find_wheel().parent.parent / "nvidia_pytriton.libs"


def server_environment(wheel: Path, folder: Path, gpu_packages: Path | None) -> dict[str, str]:
    """Return the environment of the server and of its Python stub.

    Libraries come from the wheel, the running Python and `gpu_packages`, before those of the
    system. The stub ignores PYTHONPATH; the model reads it and finds this environment's packages.

    Args:
        wheel: folder of the wheel's server.
        folder: gets a folder `bin` with a link to the running Python, because the stub uses the
            standard library of the first `python3` on PATH.
        gpu_packages: folder with the Python packages that a GPU needs; None hides the GPUs.
    """
    programs = folder / "bin"
    programs.mkdir(exist_ok=True)
    (programs / "python3").symlink_to(getattr(sys, "_base_executable", sys.executable))
    libraries = [wheel.parent.parent / "nvidia_pytriton.libs", sysconfig.get_config_var("LIBDIR")]
    packages = [wheel.parent.parent]
    environment = {**os.environ, "PATH": _joined([programs, os.environ.get("PATH") or os.defpath])}
    if gpu_packages:
        libraries += [*sorted(gpu_packages.glob("nvidia/*/lib")), PLUGINS]
        packages.insert(0, gpu_packages)
    else:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    environment["PYTHONPATH"] = _joined(packages)
    environment["LD_LIBRARY_PATH"] = _joined([*libraries, os.environ.get("LD_LIBRARY_PATH")])
    return environment


def _joined(parts: Sequence[str | Path | None]) -> str:
    return os.pathsep.join(str(part) for part in parts if part)


def find_stub(wheel: Path, environment: Mapping[str, str]) -> Path:
    """Return the wheel's program that runs Python models, after checking that it starts.

    Raises:
        LaunchError: there is none for this Python, or a library that it needs is missing.
    """
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    stubs = wheel / "python_backend_stubs"
    stub = stubs / version / "triton_python_backend_stub"
    if not stub.is_file():
        names = sorted((path.name for path in stubs.iterdir()), key=lambda v: int(v.split(".")[1]))
        raise LaunchError(
            f"tritonserver's Python backend has no stub for Python {version}: "
            f"make the environment with Python {', '.join(names)}"
        )
    # Without arguments it prints its usage and exits, if the loader finds all of its libraries.
    trial = subprocess.run(  # noqa: S603
        [stub], env=dict(environment), capture_output=True, text=True, timeout=60, check=False
    )
    missing = re.search(r"loading shared libraries: (\S+): cannot open", trial.stderr)
    if missing:
        library = missing[1]
        python = re.match(r"libpython(3\.\d+)\.so", library)
        remedy = (
            f"install the Debian package libpython{python[1]} "
            f"(`sudo apt-get install libpython{python[1]}`)"
            if python
            else f"install the package that holds it (`apt-file search {library}` names it)"
        )
        raise LaunchError(
            f"tritonserver's Python backend needs the shared library {library}: {remedy}"
        )
    return stub


def link_backends(wheel: Path, stub: Path, folder: Path) -> Path:
    """Return a new backend directory in `folder`, with the stub beside the Python backend.

    The directory holds links, because the wheel has the two in different folders and is not
    changed.
    """
    python = folder / "backends" / "python"
    python.mkdir(parents=True)
    for file in (*(wheel / "backends" / "python").glob("*triton_python*"), stub):
        (python / file.name).symlink_to(file)
    return python.parent

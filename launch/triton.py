"""NVIDIA's tritonserver out of the `nvidia-pytriton` wheel, as a child process.

The wheel is used for its binaries alone (server, Python backend, one Python stub for each Python
version); the product is a plain model repository, served the same way as by NVIDIA's container.
"""

import contextlib
import http.client
import importlib.util
import json
import os
import re
import secrets
import shlex
import subprocess
import sys
import sysconfig
import tempfile
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from flownet2.contract import MODEL_NAME
from launch.check import answers_ok, open_directly, url
from launch.child import Child, Echo
from launch.errors import LaunchError
from launch.ports import check_free, free_ports, host_from_environment, port_from_environment
from launch.repository import assemble
from launch.shared_memory import region_names

START_SECONDS = 600.0
STOP_SECONDS = 20.0

# These are for those who have the key.
RESTRICTED = "shared-memory,model-repository,trace,logging"
KEY_HEADER = "admin-key"


@dataclass(frozen=True)
class Address:
    """Where a Triton listens."""

    host: str
    http_port: int
    grpc_port: int
    metrics_port: int

    @classmethod
    def from_environment(cls) -> "Address":
        """The address that HOST and TRITON_HTTP_PORT, _GRPC_PORT and _METRICS_PORT give.

        Raises:
            LaunchError: HOST is no IPv4 address, or one of the three not a port.
        """
        return cls(
            host=host_from_environment("HOST", "127.0.0.1"),
            http_port=port_from_environment("TRITON_HTTP_PORT", 8000),
            grpc_port=port_from_environment("TRITON_GRPC_PORT", 8001),
            metrics_port=port_from_environment("TRITON_METRICS_PORT", 8002),
        )

    @property
    def http(self) -> str:
        """host:port for HTTP."""
        return f"{self.host}:{self.http_port}"

    @property
    def grpc(self) -> str:
        """host:port for gRPC."""
        return f"{self.host}:{self.grpc_port}"

    @property
    def metrics(self) -> str:
        """URL of the Prometheus metrics."""
        return f"http://{self.host}:{self.metrics_port}/metrics"


@dataclass(frozen=True)
class Triton:
    """A tritonserver that is ready; `reload` has it take in its repository as it is now, or raises
    a LaunchError, and what it served serves on."""

    address: Address
    child: Child
    reload: Callable[[], None]


def local_address() -> Address:
    """An address on this machine with ports that are free now."""
    return Address("127.0.0.1", *free_ports(3))


@contextlib.contextmanager
def serve(
    repository: Path,
    *,
    address: Address | None = None,
    config_name: str | None = None,
    echo: Echo = lambda line: None,
    stop: threading.Event | None = None,
) -> Iterator[Triton]:
    """Run a tritonserver over a model repository, ready when the block begins, gone after it.

    Args:
        repository: folder of model folders.
        address: where it listens; free ports of 127.0.0.1 when None.
        config_name: Triton's `--model-config-name` (a file of `<model>/configs/`).
        echo: receives the server's log lines.
        stop: set from elsewhere, ends the wait for readiness early.

    Raises:
        LaunchError: the server cannot start.
    """
    address = address or local_address()
    check_repository(repository)
    check_free(
        address.host,
        {
            "TRITON_HTTP_PORT": address.http_port,
            "TRITON_GRPC_PORT": address.grpc_port,
            "TRITON_METRICS_PORT": address.metrics_port,
        },
    )
    wheel = find_wheel()
    environment = wheel_environment(wheel)
    stub = find_stub(wheel, environment)
    with tempfile.TemporaryDirectory(prefix="flownet2-triton-") as folder:
        # The Python backend hands paths of models and of itself to a shell, unquoted.
        if shlex.quote(folder) != folder:
            raise LaunchError(
                f"TMPDIR={tempfile.gettempdir()} has a space or another letter that a "
                "shell may misread: set it to a folder without one, such as /tmp"
            )
        models = Path(folder) / "models"
        assemble(models, [repository.resolve()])
        key = admin_key()

        def reload() -> None:
            check_repository(repository)
            load(assemble(models, [repository.resolve()]), address, key)

        backends = link_backends(wheel, stub, Path(folder))
        command = [
            str(wheel / "bin" / "tritonserver"),
            *options(models, address, config_name, key),
            f"--backend-directory={backends}",
            "--allow-gpu-metrics=false",
        ]
        with run(command, environment, address, echo, stop or threading.Event()) as child:
            yield Triton(address, child, reload)


@contextlib.contextmanager
def run(
    command: Sequence[str | Path],
    environment: Mapping[str, str],
    address: Address,
    echo: Echo,
    stop: threading.Event,
) -> Iterator[Child]:
    """Run a tritonserver with these arguments, ready when the block begins, gone after it.

    Raises:
        LaunchError: it ended, or was not ready in time.
    """
    with region_names() as (prefix, lock):
        regions = f"--backend-config=python,shm-region-prefix-name={prefix}"
        child = Child("Triton", [*command, regions], environment, echo, inherited=[lock])
        try:
            child.wait_until(lambda: is_ready(address), START_SECONDS, stop)
            yield child
        finally:
            child.stop(STOP_SECONDS)


def is_ready(address: Address) -> bool:
    """True when the server answers and every model of its repository is loaded."""
    return answers_ok(address.host, address.http_port, "/v2/health/ready")


def check_repository(repository: Path) -> None:
    """Check that there is a model and that exports have written what each one runs.

    Raises:
        LaunchError: there is no model, or one has no network.
    """
    models = sorted(path.parent for path in repository.glob("*/config.pbtxt"))
    incomplete = [
        model
        for model in models
        if not any(model.glob("*/model.onnx" if model.name == MODEL_NAME else "*/model.*"))
    ]
    if not models or incomplete:
        missing = (incomplete[0] if incomplete else repository / MODEL_NAME) / "1" / "model.onnx"
        raise LaunchError(
            f"{missing} is missing: `make model` writes it from the weights that ship, "
            f"`python -m export --network … --weights FILE --repository {repository}` from yours"
        )


def wheel_libraries() -> Path:
    """Folder of the shared libraries that the wheel brings for tritonserver."""
    return find_wheel().parent.parent / "nvidia_pytriton.libs"


def find_wheel() -> Path:
    """Folder of the wheel that holds the server, its backends and stubs."""
    package = importlib.util.find_spec("pytriton")
    folder = Path(package.origin).parent / "tritonserver" if package and package.origin else None
    if folder is None or not (folder / "bin" / "tritonserver").is_file():
        raise LaunchError(
            "tritonserver is not installed in this Python environment: "
            "`pip install --no-deps nvidia-pytriton==0.7.0` (x86-64 and arm64 Linux only)"
        )
    return folder


def wheel_environment(wheel: Path) -> dict[str, str]:
    """The server's environment: this environment's packages for the models of the Python backend
    (its stub runs isolated and ignores PYTHONPATH, so the model reads it itself), and the
    libraries of the wheel and of the running Python before those of the system."""
    packages = wheel.parent.parent
    libraries = [
        str(wheel_libraries()),
        str(sysconfig.get_config_var("LIBDIR") or ""),
        os.environ.get("LD_LIBRARY_PATH", ""),
    ]
    return {
        **os.environ,
        "PYTHONPATH": str(packages),
        "LD_LIBRARY_PATH": ":".join(filter(None, libraries)),
    }


def find_stub(wheel: Path, environment: dict[str, str]) -> Path:
    """The wheel's program that runs Python models, proven to start on this machine."""
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    stubs = wheel / "python_backend_stubs"
    stub = stubs / version / "triton_python_backend_stub"
    if not stub.is_file():
        known = ", ".join(
            sorted((one.name for one in stubs.iterdir()), key=lambda name: int(name.split(".")[1]))
        )
        raise LaunchError(
            f"tritonserver's Python backend has no stub for Python {version}: "
            f"make the environment with one of Python {known}"
        )
    # Without arguments it prints its usage and ends, if the loader finds all of its libraries.
    trial = subprocess.run(  # noqa: S603
        [stub], env=environment, capture_output=True, text=True, timeout=60, check=False
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
    """A backend directory as Triton wants it: the stub beside the Python backend.

    Links in a folder of our own, since the wheel keeps the two apart and is not ours to change.
    """
    python = folder / "backends" / "python"
    python.mkdir(parents=True)
    for file in (*(wheel / "backends" / "python").glob("*triton_python*"), stub):
        (python / file.name).symlink_to(file)
    return python.parent


def reload_when(changed: threading.Event, reload: Callable[[], None], say: Echo) -> None:
    """Load the models again if `changed` is set; where that fails, say why and go on."""
    if not changed.is_set():
        return
    changed.clear()
    try:
        reload()
    except LaunchError as error:
        say(f"warning: {error}")


def load(models: Iterable[str], address: Address, key: str) -> None:
    """Have Triton load models again; each serves as it was until the new one is ready.

    Raises:
        LaunchError: one cannot be loaded, and serves on as it was.
    """
    for model in models:
        request = urllib.request.Request(  # noqa: S310
            f"{url(address.host, address.http_port)}/v2/repository/models/{model}/load",
            b"{}",
            {KEY_HEADER: key},
        )
        try:
            open_directly(request, timeout=START_SECONDS).close()
        except urllib.error.HTTPError as error:
            with error:
                reason = json.load(error)["error"]
            raise LaunchError(f"Triton cannot load {model} again: {reason}") from error
        except (OSError, http.client.HTTPException) as error:
            raise LaunchError(f"Triton did not load {model} again: {error}") from error


def admin_key() -> str:
    """The operator's key in the file TRITON_ADMIN_KEY_FILE; without one, a key for this once.

    Raises:
        LaunchError: the file cannot be read, or holds no key.
    """
    file = os.environ.get("TRITON_ADMIN_KEY_FILE")
    if not file:
        return secrets.token_urlsafe(24)
    try:
        key = Path(file).read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise LaunchError(f"TRITON_ADMIN_KEY_FILE={file} cannot be read: {error}") from error
    if not re.fullmatch(r"[\w.~-]{16,}", key):
        raise LaunchError(
            f"TRITON_ADMIN_KEY_FILE={file} holds no key: one line of at least 16 letters, digits "
            "or -_.~ (`openssl rand -hex 24` prints one)"
        )
    return key


def options(repository: Path, address: Address, config_name: str | None, key: str) -> list[str]:
    """Arguments of tritonserver, wherever it comes from: what it serves, where, and to whom."""
    return [
        f"--model-repository={repository.absolute()}",
        *([f"--model-config-name={config_name}"] if config_name else []),
        "--model-control-mode=explicit",
        "--load-model=*",
        "--disable-auto-complete-config",
        f"--exit-timeout-secs={STOP_SECONDS / 2:.0f}",
        "--log-format=ISO8601",
        f"--http-address={address.host}",
        f"--http-port={address.http_port}",
        f"--grpc-address={address.host}",
        f"--grpc-port={address.grpc_port}",
        f"--metrics-address={address.host}",
        f"--metrics-port={address.metrics_port}",
        f"--http-restricted-api={RESTRICTED}:{KEY_HEADER}={key}",
        f"--grpc-restricted-protocol={RESTRICTED}:{KEY_HEADER}={key}",
        *_tracing(),
        # Keepalive pings of clients and gateways come more often than gRPC's five minutes.
        "--grpc-http2-min-recv-ping-interval-without-data=5000",
        "--grpc-http2-max-ping-strikes=0",
    ]


def _tracing() -> list[str]:
    """Spans of Triton for the collector that the gateway's go to, if there is one."""
    collector = os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT")
    if not collector:
        return []
    return [
        "--trace-config=mode=opentelemetry",
        f"--trace-config=opentelemetry,url={collector.rstrip('/')}/v1/traces",
        "--trace-config=opentelemetry,resource=service.name=triton",
        "--trace-config=level=TIMESTAMPS",
        "--trace-config=rate=1",
    ]

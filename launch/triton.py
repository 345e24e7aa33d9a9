"""A tritonserver of any origin as a child process: arguments, readiness, loading models."""

import contextlib
import http.client
import json
import os
import re
import secrets
import subprocess
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from flownet2.contract import MODEL_NAME
from flownet2.triton import engine_reports
from launch.check import TIMEOUT_SECONDS, answers_ok, open_directly, reason, url, without_stack
from launch.child import Child, Echo
from launch.errors import LaunchError
from launch.ports import bracketed, free_ports, host_from_environment, port_from_environment
from launch.shared_memory import region_names

START_SECONDS = 600.0
STOP_SECONDS = 20.0

# Triton answers these only to requests that carry the operator's key.
RESTRICTED = "shared-memory,model-repository,trace,logging"
KEY_HEADER = "admin-key"

# Options of Triton 2.73 that 2.51 does not have. They allow clients' shared memory (registered by
# the operator) and HTTP bodies above 64 MB.
NEWER_OPTIONS = {"allow-client-shm": "true", "http-max-input-size": str(2**30)}


@dataclass(frozen=True)
class Address:
    """Host and ports on which a Triton listens."""

    host: str
    http_port: int
    grpc_port: int
    metrics_port: int

    @classmethod
    def from_environment(cls) -> "Address":
        """Return the address that HOST and TRITON_HTTP_PORT, _GRPC_PORT and _METRICS_PORT give.

        Raises:
            LaunchError: a value is not a port.
        """
        return cls(
            host=host_from_environment(),
            http_port=port_from_environment("TRITON_HTTP_PORT", 8000),
            grpc_port=port_from_environment("TRITON_GRPC_PORT", 8001),
            metrics_port=port_from_environment("TRITON_METRICS_PORT", 8002),
        )

    @property
    def http(self) -> str:
        """host:port for HTTP."""
        return f"{bracketed(self.host)}:{self.http_port}"

    @property
    def grpc(self) -> str:
        """host:port for gRPC."""
        return f"{bracketed(self.host)}:{self.grpc_port}"

    @property
    def metrics(self) -> str:
        """URL of the Prometheus metrics."""
        return f"{url(self.host, self.metrics_port)}/metrics"

    @property
    def ports(self) -> dict[str, int]:
        """Ports by the environment variables that set them."""
        return {
            "TRITON_HTTP_PORT": self.http_port,
            "TRITON_GRPC_PORT": self.grpc_port,
            "TRITON_METRICS_PORT": self.metrics_port,
        }


@dataclass(frozen=True)
class Triton:
    """A tritonserver that is ready.

    `reload` loads the repository again. It raises a LaunchError that names the models that failed
    to load; their old versions are still served.
    """

    address: Address
    child: Child
    reload: Callable[[], None]


def local_address() -> Address:
    """Return an address on this machine with ports that are free now."""
    return Address("127.0.0.1", *free_ports(3))


@contextlib.contextmanager
def run(
    command: Sequence[str | Path],
    environment: Mapping[str, str],
    address: Address,
    echo: Echo,
    stop: threading.Event,
) -> Iterator[Child]:
    """Run a tritonserver with these arguments, ready when the block begins, stopped after it.

    Raises:
        LaunchError: it exited, was not ready in time, or could load no model.
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
    """Return True if the server answers and has tried to load every model."""
    return answers_ok(address.host, address.http_port, "/v2/health/ready")


def serves(address: Address, model: str) -> bool:
    """Return True if the model is loaded."""
    return answers_ok(address.host, address.http_port, f"/v2/models/{model}/ready")


def report(address: Address, key: str, say: Echo) -> None:
    """Print the models that Triton could not load, and the engines of the others.

    Raises:
        LaunchError: no model at all is loaded, or Triton does not answer.
    """
    states = json.loads(_post(address, "index", key) or b"[]")
    failed = {
        state["name"]: " ".join(without_stack(str(state.get("reason", ""))).split())
        for state in states
        if state.get("state") != "READY" and state.get("reason") != "unloaded"
    }
    if len(failed) == len(states):
        raise LaunchError(f"Triton could load no model: {_listed(failed)}")
    for model, why in failed.items():
        say(f"warning: the model {model} is not served: {why}")
    for line in engines(address):
        say(line)


def engines(address: Address) -> list[str]:
    """Return a line for each model that has checked itself against its golden pair."""
    try:
        with open_directly(address.metrics, timeout=TIMEOUT_SECONDS) as response:
            metrics = response.read().decode()
    except (OSError, http.client.HTTPException):  # saves a line in Triton's log
        return []
    return [
        f"{report.model}: {report.engine} on {report.device}, {report.precision}; "
        f"differs from the golden pair by {report.golden_difference_px:.4f} px"
        for report in engine_reports(metrics)
    ]


def check_repository(repository: Path) -> None:
    """Raise an error unless the repository has a model that can be loaded.

    Raises:
        LaunchError: there is none; the message names the missing file and what writes it.
    """
    models = sorted(path.parent for path in repository.glob("*/config.pbtxt"))
    if not any(map(_has_network, models)):
        missing = (models[0] if models else repository / MODEL_NAME) / "1" / "model.onnx"
        raise LaunchError(
            f"{missing} is missing: `make model` writes it from the weights that ship, "
            f"`python -m export --network … --weights FILE --repository {repository}` from yours"
        )


def _has_network(model: Path) -> bool:
    """Return False for a folder without a model, such as our `model.py` without `model.onnx`."""
    files = {file.name: file for file in model.glob("*/model.*")}
    code = files.pop("model.py", None)
    return bool(files) or (code is not None and b"model.onnx" not in code.read_bytes())


def reload_when(changed: threading.Event, reload: Callable[[], None], say: Echo) -> None:
    """Call `reload` if `changed` is set; if it fails, print the reason and continue."""
    if not changed.is_set():
        return
    changed.clear()
    try:
        reload()
    except (LaunchError, OSError) as error:
        say(f"warning: {error}")


def load(models: Iterable[str], address: Address, key: str) -> None:
    """Have Triton load models again; it serves the old version of each until the new one is ready.

    Raises:
        LaunchError: some models could not be loaded; the others were.
    """
    failed: dict[str, str] = {}
    for model in models:
        try:
            _post(address, f"models/{model}/load", key)
        except LaunchError as error:
            failed[model] = str(error)
    if failed:
        raise LaunchError(f"not loaded again: {_listed(failed)}")


def _post(address: Address, path: str, key: str) -> bytes:
    """Send a request to Triton's model repository API and return the response's body.

    Raises:
        LaunchError: Triton refuses, or does not answer.
    """
    target = f"{url(address.host, address.http_port)}/v2/repository/{path}"
    request = urllib.request.Request(target, b"{}", {KEY_HEADER: key})  # noqa: S310
    try:
        with open_directly(request, timeout=START_SECONDS) as response:
            body: bytes = response.read()
            return body
    except urllib.error.HTTPError as error:
        with error:
            raise LaunchError(reason(error)) from error
    except (OSError, http.client.HTTPException) as error:
        raise LaunchError(f"Triton does not answer: {error}") from error


def _listed(failed: Mapping[str, str]) -> str:
    return "; ".join(f"{model}: {why}" for model, why in failed.items()) or "there is none"


def admin_key() -> str:
    """Return the operator's key: the content of TRITON_ADMIN_KEY_FILE, or a random key.

    Raises:
        LaunchError: the file cannot be read, or does not hold a key.
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
            f"TRITON_ADMIN_KEY_FILE={file} holds no key: write one line of at least 16 letters, "
            "digits or -_.~ into it (`openssl rand -hex 24` prints one)"
        )
    return key


def options(
    program: Path | str,
    environment: Mapping[str, str],
    repository: Path,
    address: Address,
    key: str,
    *,
    config_name: str | None = None,
) -> list[str]:
    """Return the arguments of any tritonserver: models, addresses, restrictions.

    Args:
        program: the tritonserver, which is asked for the newer options that it has.
        environment: of the tritonserver.
        repository: folder of model folders.
        address: host and ports on which it listens.
        key: the operator's key.
        config_name: Triton's `--model-config-name` (a file of `<model>/configs/`). A model that
            cannot be loaded with it ends Triton, so that another configuration can be tried.
            Without a name, Triton serves the models that it can load.
    """
    # IPv6 addresses need the prefix "ipv6:" for Triton's HTTP library, and brackets for gRPC.
    http_host = f"ipv6:{address.host}" if ":" in address.host else address.host
    partial = ["--exit-on-error=false", "--strict-readiness=false"]
    return [
        f"--model-repository={repository.absolute()}",
        *([f"--model-config-name={config_name}"] if config_name else partial),
        "--model-control-mode=explicit",
        "--load-model=*",
        "--disable-auto-complete-config",
        f"--exit-timeout-secs={STOP_SECONDS / 2:.0f}",
        "--log-format=ISO8601",
        f"--http-address={http_host}",
        f"--http-port={address.http_port}",
        f"--grpc-address={bracketed(address.host)}",
        f"--grpc-port={address.grpc_port}",
        f"--metrics-address={http_host}",
        f"--metrics-port={address.metrics_port}",
        f"--http-restricted-api={RESTRICTED}:{KEY_HEADER}={key}",
        f"--grpc-restricted-protocol={RESTRICTED}:{KEY_HEADER}={key}",
        *_tracing(),
        # Clients and gateways send keepalive pings more often than gRPC's default of five minutes.
        "--grpc-http2-min-recv-ping-interval-without-data=5000",
        "--grpc-http2-max-ping-strikes=0",
        *_newer_options(program, environment),
    ]


def _newer_options(program: Path | str, environment: Mapping[str, str]) -> list[str]:
    """Return the options in NEWER_OPTIONS that this tritonserver lists in its help."""
    try:
        done = subprocess.run(  # noqa: S603
            [program, "--help"],
            env=dict(environment),
            capture_output=True,
            text=True,
            errors="replace",
            timeout=60,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise LaunchError(f"{program} does not run: {error}") from error
    known = done.stdout + done.stderr
    return [f"--{name}={value}" for name, value in NEWER_OPTIONS.items() if f"--{name}" in known]


def _tracing() -> list[str]:
    """Return the options that send Triton's traces to the gateway's collector, if one is set."""
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

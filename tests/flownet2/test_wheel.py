"""The wheel: what is in it, and what works with and without its extras."""

import ast
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from collections.abc import Callable, Iterable
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from flownet2 import read_flow
from tests.support.gateway_stack import ROOT, Gateway, picture

PROJECT = "flownet2-triton"
PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project's wheel, built from the files that git tracks."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    subprocess.run(
        ["git", "-C", ROOT, "checkout-index", "--all", f"--prefix={source}/"], check=True
    )
    build = ("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, source)
    subprocess.run([*PIP, *build], check=True)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Make a new environment with the wheel, some extras, and what those require."""

    def make(*extras: str) -> Path:
        folder = tmp_path_factory.mktemp("environment")
        venv.create(folder)
        python = folder / "bin" / "python"
        subprocess.run([*PIP, "--python", python, "install", "--no-deps", wheel], check=True)
        packages = folder / Path(sysconfig.get_path("purelib")).relative_to(sys.prefix)
        (project,) = metadata.distributions(path=[str(packages)])
        for distribution in required(project, extras):
            for top in {file.parts[0] for file in distribution.files or ()} - {"..", "__pycache__"}:
                if not (packages / top).exists():
                    (packages / top).symlink_to(Path(str(distribution.locate_file(top))))
        return folder

    return make


def required(project: metadata.Distribution, extras: Iterable[str]) -> list[metadata.Distribution]:
    """Return the installed distributions that a project needs, with all that those need."""
    found: dict[str, metadata.Distribution] = {}
    waiting = [(project, {*extras, ""})]
    while waiting:
        distribution, wanted = waiting.pop()
        for needed in map(Requirement, distribution.requires or ()):
            marker = needed.marker
            if marker and not any(marker.evaluate({"extra": extra}) for extra in wanted):
                continue
            name = canonicalize_name(needed.name)
            if name not in found or needed.extras:
                found[name] = metadata.distribution(name)
                waiting.append((found[name], {*needed.extras, ""}))
    return list(found.values())


def run(*command: object, folder: Path, status: int = 0) -> str:
    """Return what a command prints on both streams."""
    done = subprocess.run(
        list(map(str, command)),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=folder,
        check=False,
    )
    assert done.returncode == status, done.stdout
    return done.stdout


def test_the_wheel_holds_flownet2_alone(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {
        "flownet2",
        "flownet2_triton",  # .dist-info
    }
    assert "flownet2/py.typed" in names


USE = """
import importlib.util, sys
from flownet2 import Client, Error
with Client(sys.argv[1]) as client:
    print(client.flow(sys.argv[2], sys.argv[3]).flow.shape)
try:
    Client("grpc://127.0.0.1:1").models()
except Error as error:
    print(error)
for absent in ("torch", "onnx", "openvino", "cv2", "fastapi", "typer", "av", "fsspec", "grpc"):
    assert importlib.util.find_spec(absent) is None, absent
"""


def test_client_without_extras(
    environment: Callable[..., Path], gateway: Gateway, tmp_path: Path
) -> None:
    folder = environment()
    paths = [tmp_path / "a.png", tmp_path / "b.png"]
    for seed, path in enumerate(paths):
        picture(seed).save(path)
    said = run(folder / "bin" / "python", "-c", USE, gateway.url, *paths, folder=tmp_path)
    shape, missing = said.splitlines()
    assert shape == "(48, 64, 2)"
    assert "pip install 'flownet2-triton[grpc]'" in missing
    (line,) = run(folder / "bin" / "flownet2", folder=tmp_path, status=1).splitlines()
    assert "pip install 'flownet2-triton[cli]'" in line


def test_the_command(environment: Callable[..., Path], gateway: Gateway, tmp_path: Path) -> None:
    command = environment("cli", "grpc") / "bin" / "flownet2"
    paths = [tmp_path / "a.png", tmp_path / "b.png"]
    images = [picture(seed) for seed in (1, 2)]
    for path, image in zip(paths, images, strict=True):
        image.save(path)
    run(command, "pair", *paths, "-o", "flow.flo", "--server", gateway.url, folder=tmp_path)
    first, second = (np.asarray(image, np.float32) for image in images)
    np.testing.assert_array_equal(read_flow(tmp_path / "flow.flo"), (second - first)[..., :2] / 8)
    run(command, "run", tmp_path, "-o", "out", "--server", gateway.url, folder=tmp_path)
    assert len(list((tmp_path / "out").rglob("*.flo"))) == 1
    assert "make serve" in run(command, "serve", folder=tmp_path, status=1)


def declared(*extras: str) -> list[Requirement]:
    """Return the requirements in pyproject.toml of the project ("") and of some extras."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lists = {"": project["dependencies"], **project["optional-dependencies"]}
    found: list[Requirement] = []
    waiting = ["", *(extras or lists)]
    while waiting:
        for needed in map(Requirement, lists[waiting.pop()]):
            if needed.name == PROJECT:
                waiting += needed.extras
            else:
                found.append(needed)
    return found


def imported(folder: str) -> set[str]:
    """Return the top-level packages that a folder's modules import anywhere."""
    names = set()
    for path in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names.add(node.module.partition(".")[0])
    return names


@pytest.mark.parametrize(
    ("folder", "extras"),
    [
        ("flownet2", ["cli", "grpc", "hdf5"]),
        ("gateway", ["gateway", "otel"]),
        ("launch", ["serve"]),
        ("export", ["export", "triton"]),
        ("training", ["train", "dev"]),
        ("benchmarks", ["dev"]),
        ("tests", ["dev"]),
    ],
)
def test_imports_are_declared(folder: str, extras: list[str]) -> None:
    names = {canonicalize_name(needed.name) for needed in declared(*extras)}
    owners = metadata.packages_distributions()
    for package in imported(folder) & owners.keys() - {path.name for path in ROOT.iterdir()}:
        projects = set(map(canonicalize_name, owners[package]))
        assert projects & names, f"{folder} imports {package}, which {projects} install"


def test_every_requirement_has_a_lower_bound() -> None:
    for needed in declared():
        assert any(one.operator == ">=" for one in needed.specifier), needed

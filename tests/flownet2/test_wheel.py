"""The client and the command as `pip install .` gives them: without torch, onnx or a server."""

import subprocess
import sys
import sysconfig
import venv
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
from packaging.requirements import Requirement

from flownet2 import read_flow
from tests.support.gateway_stack import ROOT, Gateway, picture


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new environment with the project's wheel, and what that wheel says it needs."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    source = folder / "source"
    subprocess.run(
        ["git", "-C", ROOT, "checkout-index", "--all", f"--prefix={source}/"], check=True
    )
    build = ("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, source)
    subprocess.run([*pip, *build], check=True)
    (wheel,) = folder.glob("*.whl")
    venv.create(folder / "env")
    python = folder / "env" / "bin" / "python"
    subprocess.run([*pip, "--python", python, "install", "--no-deps", wheel], check=True)
    packages = folder / "env" / Path(sysconfig.get_path("purelib")).relative_to(sys.prefix)
    (project,) = metadata.distributions(path=[str(packages)])
    link(project, packages)
    return folder / "env"


def link(project: metadata.Distribution, packages: Path) -> None:
    """Link the installed distributions that a project needs, with all that those need."""
    waiting: list[tuple[metadata.Distribution, set[str]]] = [(project, set())]
    while waiting:
        distribution, extras = waiting.pop()
        for needed in map(Requirement, distribution.requires or ()):
            marker = needed.marker
            if marker and not any(marker.evaluate({"extra": extra}) for extra in extras | {""}):
                continue
            found = metadata.distribution(needed.name)
            tops = {file.parts[0] for file in found.files or ()} - {"..", "__pycache__"}
            if any((packages / top).exists() for top in tops):
                continue
            waiting.append((found, needed.extras))
            for top in tops:
                (packages / top).symlink_to(Path(str(found.locate_file(top))))


USE = """
import importlib.util, sys
from importlib.resources import files
from flownet2 import Client
assert (files("flownet2") / "py.typed").is_file()
with Client(sys.argv[1]) as client:
    print(client.flow(sys.argv[2], sys.argv[3]).flow.shape)
for absent in ("torch", "onnx", "openvino", "cv2", "fastapi"):
    assert importlib.util.find_spec(absent) is None, absent
"""


def test_client_and_command_of_the_wheel(
    environment: Path, gateway: Gateway, tmp_path: Path
) -> None:
    paths = [tmp_path / "a.png", tmp_path / "b.png"]
    images = [picture(seed) for seed in (1, 2)]
    for path, image in zip(paths, images, strict=True):
        image.save(path)

    def use(*command: object) -> str:
        return subprocess.run(
            list(map(str, command)), check=True, capture_output=True, text=True, cwd=tmp_path
        ).stdout

    said = use(environment / "bin" / "python", "-c", USE, gateway.url, *paths)
    assert said == "(48, 64, 2)\n"
    command = environment / "bin" / "flownet2"
    use(command, "pair", *paths, "-o", "flow.flo", "--server", gateway.url)
    first, second = (np.asarray(image, np.float32) for image in images)
    np.testing.assert_array_equal(read_flow(tmp_path / "flow.flo"), (second - first)[..., :2] / 8)
    use(command, "run", tmp_path, "-o", tmp_path / "out", "--server", gateway.url)
    assert len(list((tmp_path / "out").rglob("*.flo"))) == 1
    served = subprocess.run([command, "serve"], capture_output=True, text=True, check=False)
    assert served.returncode == 1
    assert "make serve" in served.stderr

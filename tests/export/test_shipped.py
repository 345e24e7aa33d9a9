"""The shipped model replaces no other model unasked, and matches its description."""

import shutil
import subprocess
import sys
from pathlib import Path

import onnx
import pytest

from export import shipped
from export.repository import write_model
from tests.support.tiny_network import tiny_network

ROOT = Path(__file__).parents[2]
OTHER = {"network": "FlowNet2", "weights_source": "the user", "weights_license": "none"}


def graph(repository: Path) -> onnx.ModelProto:
    return onnx.load(repository / "flownet2" / "1" / "model.onnx")


def test_exported_weights_of_others_stay_until_the_shipped_are_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_model(tmp_path, "flownet2", tiny_network("the user"), OTHER)
    shipped.main(["--repository", str(tmp_path), "--keep-other"])
    assert graph(tmp_path).producer_name == "the user"
    assert "keeps its other weights; `make model`" in capsys.readouterr().out

    shipped.main(["--repository", str(tmp_path)])
    assert graph(tmp_path).producer_name != "the user"
    assert not shipped.holds_other_model(tmp_path)


def test_a_model_that_is_old_or_gone_is_written(tmp_path: Path) -> None:
    _, description = shipped.shipped_model()
    old = tiny_network("an old version")
    older = description | {"weights_source": "what shipped before"}
    write_model(tmp_path, "flownet2", old, older)
    shipped.main(["--repository", str(tmp_path), "--keep-other"])
    assert graph(tmp_path).producer_name != old.producer_name

    write_model(tmp_path, "flownet2", old, OTHER)
    shutil.rmtree(tmp_path / "flownet2" / "1")
    shipped.main(["--repository", str(tmp_path), "--keep-other"])
    assert graph(tmp_path).producer_name != old.producer_name


def make(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    shutil.copy(ROOT / "Makefile", folder)
    return subprocess.run(
        ["make", *arguments], cwd=folder, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("version", [(3, 10), (3, 14), (2, 7)])
def test_a_python_that_nothing_was_tested_with_is_refused(
    tmp_path: Path, version: tuple[int, int]
) -> None:
    python = tmp_path / "python"
    python.write_text(
        f'#!/bin/sh\n[ "$1" = -c ] || exit 5\n'
        f'exec {sys.executable} -c "import sys; sys.version_info = {(*version, 0)}\n$2"\n'
    )
    python.chmod(0o755)
    done = make(tmp_path, ".venv/bin/python", f"PYTHON={python}")
    said = f"{python} is Python {version[0]}.{version[1]}, and 3.11 to 3.13 is needed"
    assert done.returncode != 0
    assert f"{said}: name one, as in PYTHON=python3.12" in done.stderr
    assert not (tmp_path / ".venv").exists()


def test_clean_keeps_what_was_exported_and_trained(tmp_path: Path) -> None:
    for file in (".venv/x", "build/x", "runs/c/model.pt", "model_repository/flownet2/1/model.onnx"):
        (tmp_path / file).parent.mkdir(parents=True)
        (tmp_path / file).touch()
    assert make(tmp_path, "clean").returncode == 0
    left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert left == {"Makefile", "runs/c/model.pt", "model_repository/flownet2/1/model.onnx"}

"""Builds the plugins once a test session, the way plugins/README.md says, in build/plugins."""

from __future__ import annotations

import functools
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PLUGINS = ROOT / "plugins"
BUILD = ROOT / "build" / "plugins"


def needs(*programs: str) -> None:
    """Skip the test, saying why, unless all `programs` are on the PATH."""
    for program in programs:
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed")


def run(*command: str | Path) -> str:
    """The output of a command that must succeed; a failure shows all that it printed."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
    output = done.stdout.decode(errors="replace")
    if done.returncode != 0:
        pytest.fail(f"{' '.join(map(str, command))}\n{output}", pytrace=False)
    return output


@functools.cache
def build() -> Path:
    """The build folder, with every library that this machine has compilers and headers for."""
    needs("cmake", "c++")
    run("cmake", "-S", PLUGINS, "-B", BUILD)
    run("cmake", "--build", BUILD, "--parallel", "2")
    return BUILD


def onnxruntime_library() -> Path:
    """libflownet2_onnxruntime.so; skips where ONNX Runtime's headers are missing."""
    library = build() / "libflownet2_onnxruntime.so"
    if not library.exists():
        pytest.skip("no onnxruntime_cxx_api.h: run plugins/fetch_headers.sh build/onnxruntime")
    return library

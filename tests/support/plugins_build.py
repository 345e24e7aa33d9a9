"""Builds the plugins once a test session, the way plugins/README.md says, in build/plugins."""

from __future__ import annotations

import functools
import importlib.util
import os
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
    """The build folder, with every library that this machine has compilers and headers for.

    `ptxas.log` beside them says what the CUDA kernels need of a multiprocessor. TensorRT's headers
    come with NVIDIA's container or its public repository: TENSORRT_INCLUDE_DIR names their folder.
    """
    needs("cmake", "c++")
    options = ["-DCMAKE_COMPILE_WARNING_AS_ERROR=ON", "-DCMAKE_CUDA_FLAGS=-Xptxas=-v"]
    if (headers := os.environ.get("TENSORRT_INCLUDE_DIR")) and (library := tensorrt_rtx()):
        options += [f"-DTENSORRT_INCLUDE_DIR={headers}", f"-DTENSORRT_LIBRARY={library}"]
    run("cmake", "-S", PLUGINS, "-B", BUILD, *options)
    log = run("cmake", "--build", BUILD, "--parallel", "2")
    if "ptxas info" in log:  # not where the kernels were built before
        (BUILD / "ptxas.log").write_text(log)
    return BUILD


def library(name: str) -> Path:
    """One of the libraries that were built; skips where this machine lacks what it needs."""
    file = build() / name
    if not file.exists():
        pytest.skip(f"{name} was not built: `cmake -S plugins -B build/plugins` says why")
    return file


def tensorrt_rtx() -> Path | None:
    """The library of the package tensorrt-rtx: TensorRT without GPU and plugin layers."""
    package = importlib.util.find_spec("tensorrt_rtx_libs")
    if package is None or not package.submodule_search_locations:
        return None
    (found,) = Path(package.submodule_search_locations[0]).glob("libtensorrt_rtx.so.*")
    return found

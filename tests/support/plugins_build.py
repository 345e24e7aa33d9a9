"""Builds the plugins once a test session, as plugins/README.md describes, in build/plugins."""

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
    """Skip the test unless all `programs` are on the PATH."""
    for program in programs:
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed")


def run(*command: str | Path) -> str:
    """Run a command that must succeed, and return its output."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
    output = done.stdout.decode(errors="replace")
    if done.returncode != 0:
        pytest.fail(f"{' '.join(map(str, command))}\n{output}", pytrace=False)
    return output


@functools.cache
def build() -> Path:
    """Build every library that this machine has compilers and headers for; return the folder.

    `ptxas.log` beside them has the resources of the CUDA kernels. TENSORRT_INCLUDE_DIR names the
    folder of TensorRT's headers, which come with NVIDIA's container or its public repository.
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
    """Return one of the libraries; skip the test if this machine cannot build it."""
    file = build() / name
    if not file.exists():
        pytest.skip(f"{name} was not built: `cmake -S plugins -B build/plugins` says why")
    return file


def tensorrt_rtx() -> Path | None:
    """Return the library of tensorrt-rtx: TensorRT without a GPU and without plugin layers."""
    package = importlib.util.find_spec("tensorrt_rtx_libs")
    if package is None or not package.submodule_search_locations:
        return None
    (found,) = Path(package.submodule_search_locations[0]).glob("libtensorrt_rtx.so.*")
    return found

"""The CUDA kernels without a GPU: compiled for every architecture, and their threads emulated.

What a GPU makes of them, speed above all, plugins/test_cuda.py shows on a machine that has one.
"""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.correlation_cases import (
    CASES,
    REFUSED_CASES,
    Array,
    Case,
    brute_force,
    tolerance,
)
from tests.support.plugins_build import PLUGINS, needs, run

SOURCES = tuple(
    PLUGINS / name for name in ("correlation.cu", "correlation.cpp", "correlation_c.cpp")
)


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The library that plugins/test_cuda.py builds with nvcc, on tests/cuda_emulation instead."""
    needs("c++")
    library = tmp_path_factory.mktemp("emulated") / "correlation.so"
    headers = Path(__file__).parents[1] / "support" / "cuda_emulation"
    run(
        *("c++", "-std=gnu++17", "-O2", "-Wno-unknown-pragmas", "-shared", "-fPIC"),
        *("-I", headers, "-x", "c++", *SOURCES, "-o", library),
    )
    loaded = ctypes.CDLL(str(library))
    loaded.flownet2_correlation_cuda.restype = ctypes.c_char_p
    return loaded


def correlate(library: ctypes.CDLL, case: Case, a: Array, b: Array, out: Array) -> None:
    """Writes `out`; raises ValueError with the library's message."""
    message = library.flownet2_correlation_cuda(
        (ctypes.c_int32 * 5)(*case.attributes.values()),
        (ctypes.c_int64 * 4)(*case.shape),
        ctypes.c_int(a.dtype == np.float16),
        *(ctypes.c_void_p(array.ctypes.data) for array in (a, b, out)),
        None,
    )
    if message is not None:
        raise ValueError(message.decode())


@pytest.mark.parametrize("dtype", [np.float32, np.float16], ids=lambda dtype: dtype.__name__)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_matches_brute_force(
    emulated: ctypes.CDLL, case: Case, dtype: type[np.floating[Any]]
) -> None:
    a, b = case.inputs(dtype)
    size = int(np.prod(case.output_shape))
    guarded = np.full(size + 64, np.nan, dtype)  # the ends must stay as they are
    correlate(emulated, case, a, b, guarded[32:-32])
    output = guarded[32:-32].reshape(case.output_shape)
    np.testing.assert_allclose(output, brute_force(case, a, b), **tolerance(dtype))
    assert np.isnan(guarded[:32]).all()
    assert np.isnan(guarded[-32:]).all()


@pytest.mark.parametrize(
    ("case", "word"), REFUSED_CASES, ids=lambda value: getattr(value, "name", "")
)
def test_refuses_with_a_message(emulated: ctypes.CDLL, case: Case, word: str) -> None:
    image = np.zeros(case.shape, np.float32)
    with pytest.raises(ValueError, match=word):
        correlate(emulated, case, image, image, np.empty(0, np.float32))


ARCHITECTURES = [75, 80, 86, 89, 90, 100, 110, 120]


def test_cmake_builds_for_the_architectures_that_nvcc_knows(tmp_path: Path) -> None:
    needs("cmake")
    text = (PLUGINS / "CMakeLists.txt").read_text(encoding="utf-8")
    choice = re.search(r"if\(NOT DEFINED CMAKE_CUDA_ARCHITECTURES\).*?\n  endif\(\)", text, re.S)
    assert choice is not None
    script = tmp_path / "choice.cmake"
    script.write_text(f'{choice[0]}\nmessage(STATUS "chosen: ${{CMAKE_CUDA_ARCHITECTURES}}")\n')
    nvcc = tmp_path / "nvcc"

    def said(known: list[int]) -> str:
        nvcc.write_text("\n".join(["#!/bin/sh", *(f"echo sm_{one}" for one in known)]))
        nvcc.chmod(0o755)
        return run("cmake", f"-DCMAKE_CUDA_COMPILER={nvcc}", "-P", script)

    every = "75-real;80-real;86-real;89-real;90-real;100-real;110-real;120\n"
    assert said([*ARCHITECTURES, 103, 121]).endswith(f"chosen: {every}")
    older = said([70, 75, 80, 86, 87, 89, 90])
    assert older.endswith("chosen: 75-real;80-real;86-real;89-real;90\n")
    assert "does not know sm_100: left out" in older


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_nvcc_compiles_and_keeps_sums_in_registers(architecture: int, tmp_path: Path) -> None:
    needs("nvcc")
    output = run(
        *("nvcc", "-std=c++17", "-O3", "--Werror", "all-warnings", "-Xptxas", "-v", "-I", PLUGINS),
        *("-gencode", f"arch=compute_{architecture},code=sm_{architecture}"),
        *("-c", SOURCES[0], "-o", tmp_path / "correlation.o"),
    )
    kernels = output.split("Compiling entry function")[1:]
    tiled = [kernel for kernel in kernels if "correlate_any" not in kernel]
    assert len(tiled) == 3
    for kernel in tiled:  # what is set once a block may spill, what is used each step may not
        spilled = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", kernel)
        assert spilled is not None
        assert max(map(int, spilled.groups())) <= 40


def test_gpu_script_says_what_it_lacks() -> None:
    """Without a GPU (hidden here if there is one) the script builds, says so and exits with 2."""
    needs("nvcc")
    done = subprocess.run(
        [sys.executable, PLUGINS / "test_cuda.py"],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert "no GPU" in done.stdout

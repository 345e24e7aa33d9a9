"""The CUDA kernels without a GPU: compiled for every architecture, and their threads emulated.

`python -m benchmarks.correlation` runs and times them on a GPU.
"""

from __future__ import annotations

import ctypes
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from plugins.correlation_cases import (
    CASES,
    REFUSED_CASES,
    Array,
    Case,
    brute_force,
    tolerance,
)
from tests.support.plugins_build import PLUGINS, build, needs, run

SOURCES = tuple(
    PLUGINS / name for name in ("correlation.cu", "correlation.cpp", "correlation_c.cpp")
)


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The library that benchmarks/correlation.py builds with nvcc, on an emulation of CUDA."""
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


def test_nvcc_keeps_sums_in_registers() -> None:
    """Registers that a block sets once may spill; registers that each step uses may not."""
    needs("nvcc")
    kernels = (build() / "ptxas.log").read_text().split("Compiling entry function")[1:]
    spills = [
        max(map(int, found.groups()))
        for kernel in kernels
        if "correlate_flownet" in kernel
        and (found := re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", kernel))
    ]
    assert len(spills) >= 2  # of each of two kernels, for every architecture
    assert max(spills) <= 40

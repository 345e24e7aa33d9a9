"""The ONNX Runtime op on the CPU against brute force, in real sessions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from tests.support.correlation_cases import CASES, REFUSED_CASES, Case, brute_force, tolerance
from tests.support.correlation_model import one_node_model
from tests.support.plugins_build import PLUGINS, onnxruntime_library, run

DTYPES = (np.float32, np.float16)
# How the compiler is made to believe in an older processor: the macro hides the built-in test.
# "avx512f" is the only name of eight bytes.
PROCESSORS = {
    "baseline": "-D__builtin_cpu_supports(name)=false",
    "avx2": "-D__builtin_cpu_supports(name)=(sizeof(name)!=8)",
}


@pytest.fixture(scope="module")
def library() -> Path:
    return onnxruntime_library()


def session(
    library: Path, case: Case, dtype: type[np.floating[Any]] = np.float32, threads: int = 2
) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    options.register_custom_ops_library(str(library))
    return onnxruntime.InferenceSession(
        one_node_model(case, dtype).SerializeToString(),
        options,
        providers=["CPUExecutionProvider"],
    )


def check(library: Path, case: Case, dtype: type[np.floating[Any]], threads: int = 2) -> None:
    a, b = case.inputs(dtype)
    (output,) = session(library, case, dtype, threads).run(None, {"a": a, "b": b})
    assert output.dtype == dtype
    assert output.shape == case.output_shape
    np.testing.assert_allclose(output, brute_force(case, a, b), **tolerance(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: dtype.__name__)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_matches_brute_force(library: Path, case: Case, dtype: type[np.floating[Any]]) -> None:
    check(library, case, dtype)


@pytest.fixture(scope="module", params=PROCESSORS)
def older_library(
    request: pytest.FixtureRequest, library: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    cache = (library.parent / "CMakeCache.txt").read_text()
    (line,) = (line for line in cache.splitlines() if line.startswith("ONNXRUNTIME_INCLUDE_DIR:"))
    older = tmp_path_factory.mktemp(request.param) / "older.so"
    sources = ("onnxruntime_op.cpp", "correlation.cpp", "correlation_cpu.cpp")
    run(
        *("c++", "-std=gnu++17", "-O1", "-shared", "-fPIC", PROCESSORS[request.param]),
        *("-isystem", line.partition("=")[2], *(PLUGINS / name for name in sources), "-o", older),
    )
    return older


def test_older_processors_get_the_same(older_library: Path) -> None:
    for case in CASES:
        for dtype in DTYPES:
            check(older_library, case, dtype)


def test_one_thread_gets_the_same_as_many(library: Path) -> None:
    case = CASES[1]
    a, b = case.inputs()
    one, many = (
        session(library, case, threads=threads).run(None, {"a": a, "b": b})[0] for threads in (1, 4)
    )
    np.testing.assert_array_equal(one, many)


@pytest.mark.parametrize("special", [np.inf, -np.inf, np.nan, 6e-8, 65504.0])
def test_half_keeps_special_values(library: Path, special: float) -> None:
    """One channel, no displacement: the op is a product, so every half comes back as it went in."""
    case = Case("product", (1, 1, 3, 19), 0, 1, 0, 1, 1)
    a = np.full(case.shape, special, np.float16)
    (output,) = session(library, case, np.float16).run(None, {"a": a, "b": np.ones_like(a)})
    np.testing.assert_array_equal(output, a)


def test_every_half_survives(older_library: Path) -> None:
    """All 65536 halves, through the conversions with and without hardware for them."""
    halves = np.arange(2**16, dtype=np.uint16).view(np.float16).reshape(1, 1, 256, 256)
    case = Case("product", halves.shape, 0, 1, 0, 1, 1)
    run_older = session(older_library, case, np.float16).run
    (same,) = run_older(None, {"a": halves, "b": np.ones_like(halves)})
    np.testing.assert_array_equal(same, halves)
    # A third of each: results that need rounding, subnormal ones among them.
    third = np.full_like(halves, 1 / 3)
    (rounded,) = run_older(None, {"a": halves, "b": third})
    with np.errstate(invalid="ignore"):
        expected = (halves.astype(np.float32) * third.astype(np.float32)).astype(np.float16)
    np.testing.assert_array_equal(rounded, expected)


@pytest.mark.parametrize(
    ("case", "word"), REFUSED_CASES, ids=lambda value: getattr(value, "name", value)
)
def test_refuses_with_a_message(library: Path, case: Case, word: str) -> None:
    a, b = case.inputs()
    with pytest.raises(Exception, match=word):
        session(library, case).run(None, {"a": a, "b": b})


def test_refuses_inputs_of_different_shape(library: Path) -> None:
    a, b = CASES[0].inputs()
    with pytest.raises(Exception, match="one shape"):
        session(library, CASES[0]).run(None, {"a": a, "b": b[:, :, :-1]})


def test_refuses_a_missing_attribute(library: Path) -> None:
    model = one_node_model(CASES[0])
    attributes = model.graph.node[0].attribute
    del attributes[[attribute.name for attribute in attributes].index("stride2")]
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.register_custom_ops_library(str(library))
    with pytest.raises(Exception, match="stride2"):
        onnxruntime.InferenceSession(model.SerializeToString(), options)


def test_empty_batch(library: Path) -> None:
    empty = np.empty((0, 4, 8, 8), np.float32)
    (output,) = session(library, CASES[0]).run(None, {"a": empty, "b": empty})
    assert output.shape == (0, 441, 8, 8)

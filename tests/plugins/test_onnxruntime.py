"""The ONNX Runtime op against brute force, in real sessions on the CPU."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from plugins.correlation_cases import CASES, REFUSED_CASES, Case, brute_force, tolerance
from tests.support.correlation_model import one_node_model
from tests.support.plugins_build import library as built_library


@pytest.fixture(scope="module")
def library() -> Path:
    return built_library("libflownet2_onnxruntime.so")


def session(library: Path, case: Case) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.register_custom_ops_library(str(library))
    return onnxruntime.InferenceSession(
        one_node_model(case).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_matches_brute_force(library: Path, case: Case) -> None:
    a, b = case.inputs()
    (output,) = session(library, case).run(None, {"a": a, "b": b})
    assert output.shape == case.output_shape
    np.testing.assert_allclose(output, brute_force(case, a, b), **tolerance(np.float32))


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

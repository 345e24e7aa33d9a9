"""The GPU's engine, with ONNX Runtime's CPU provider in place of CUDA's."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from export.served import onnxruntime_engine
from export.served.onnxruntime_engine import DIMENSIONS, OnnxRuntimeEngine, batches
from tests.support.pairs import end_point_error, expected, pair

CPU = "CPUExecutionProvider"


@pytest.mark.parametrize(
    ("shape", "sizes"),
    [
        ((1, 512, 512, 3), [1]),
        ((8, 576, 576, 3), [8]),
        ((7, 64, 576, 3), [4, 2, 1]),
        ((13, 64, 64, 3), [8, 4, 1]),
        ((3, 64, 577, 3), [1, 1, 1]),
    ],
)
def test_batches_are_powers_of_two_of_small_images(
    shape: tuple[int, ...], sizes: list[int]
) -> None:
    parts = list(batches(shape))
    assert [part.stop - part.start for part in parts] == sizes
    assert [part.start for part in parts] == [sum(sizes[:n]) for n in range(len(sizes))]


# Operators for which ONNX Runtime 1.32 has CUDA kernels in our graphs' types (OperatorKernels.md).
ON_CUDA = {
    *("Add", "And", "Cast", "Concat", "Conv", "ConvTranspose", "Div", "Gather", "GreaterOrEqual"),
    *("GridSample", "LeakyRelu", "Less", "MatMul", "Mul", "Pad", "ReduceL2", "Reshape", "Resize"),
    *("Slice", "Sub", "Transpose", "Unsqueeze", "Where"),
}


def test_fixed_dimensions_leave_only_what_runs_on_cuda(onnx_file: Path, tmp_path: Path) -> None:
    """A node that runs on the CPU would forbid a CUDA graph."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    for dimension, size in zip(DIMENSIONS, (2, 100, 200), strict=True):
        options.add_free_dimension_override_by_name(dimension, size)
    half = onnx_file.parent / "model_fp16.onnx"
    onnxruntime.InferenceSession(half, options, providers=[CPU])
    nodes = onnx.load(tmp_path / "optimised.onnx").graph.node
    assert len(nodes) > 300
    assert {node.op_type for node in nodes} <= ON_CUDA


def test_recurring_shapes_get_sessions_of_their_own_within_the_memory(
    onnx_file: Path,
    reference: onnxruntime.InferenceSession,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made: list[tuple[int, ...] | None] = []
    create = OnnxRuntimeEngine._session

    def session(self: OnnxRuntimeEngine, shape: tuple[int, ...] | None = None) -> object:
        made.append(shape)
        return create(self, shape)

    monkeypatch.setattr(OnnxRuntimeEngine, "_session", session)
    size = (onnx_file.parent / "model_fp16.onnx").stat().st_size
    monkeypatch.setattr(onnxruntime_engine, "PLANNED_BYTES", int(2.5 * size))
    monkeypatch.setattr(onnxruntime_engine, "PIXEL_BYTES", 0)
    engine = OnnxRuntimeEngine(onnx_file.parent, provider=CPU)
    small, wide, batch = pair(64, 64), pair(64, 100), pair(64, 64, batch=2)

    def ask(*pairs: tuple[np.ndarray, np.ndarray]) -> list[tuple[int, ...] | None]:
        """Request flows; return the shapes of the sessions that were made for them."""
        made.clear()
        for images in pairs:
            error = end_point_error(engine(*images), expected(reference, images))
            assert error.mean() < 0.02
        return made[:]

    assert ask(small, wide, small, wide) == []
    assert ask(small, wide) == [(1, 64, 64, 3), (1, 64, 100, 3)]
    assert ask(small, wide, small, wide) == []
    assert ask(batch, batch, small, batch, small) == [(2, 64, 64, 3)]  # evicts `wide`
    assert ask(wide) == [(1, 64, 100, 3)]


def test_shape_without_a_session_of_its_own_is_served_by_that_for_any(
    onnx_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = OnnxRuntimeEngine(onnx_file.parent, provider=CPU)
    tries: list[object] = []

    def session(shape: object) -> None:
        tries.append(shape)
        raise Exception("no memory")

    monkeypatch.setattr(engine, "_session", session)
    images = pair(64, 64)
    flows = [engine(*images) for _ in range(6)]
    assert len(tries) == 1
    assert {flow.tobytes() for flow in flows} == {flows[0].tobytes()}


def test_provider_that_does_not_load_is_an_error(onnx_file: Path) -> None:
    """ONNX Runtime itself falls back to the CPU without an error."""
    with pytest.raises(Exception, match="CUDAExecutionProvider"):
        OnnxRuntimeEngine(onnx_file.parent)

"""The CPU's engine against ONNX Runtime."""

import itertools
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from export.served import openvino_engine
from export.served.machine import has_bfloat16
from export.served.openvino_engine import OpenVinoEngine, precisions
from tests.support.exported import Exported
from tests.support.pairs import end_point_error, expected, pair

# Sizes that need no, some and much padding to multiples of 64; landscape and portrait.
SIZES = [(512, 512), (388, 584), (75, 100), (100, 75), (16, 16)]

needs_bfloat16 = pytest.mark.skipif(
    not has_bfloat16(), reason="this CPU has no bfloat16 arithmetic"
)


@pytest.fixture(scope="module")
def engine_fp32(onnx_file: Path) -> OpenVinoEngine:
    return OpenVinoEngine(onnx_file, "fp32")


@pytest.fixture(scope="module")
def engine_bf16(onnx_file: Path) -> OpenVinoEngine:
    return OpenVinoEngine(onnx_file, "bf16")


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("size", SIZES)
def test_float32_engine_is_onnx_runtime(
    engine_fp32: OpenVinoEngine,
    reference: onnxruntime.InferenceSession,
    size: tuple[int, int],
    batch: int,
) -> None:
    images = pair(*size, batch=batch)
    want = expected(reference, images)
    assert np.abs(want).max() > 1  # or the comparison says nothing
    got = engine_fp32(*images)
    assert got.shape == (batch, *size, 2)
    assert np.abs(got - want).max() < 1e-3


@needs_bfloat16
@pytest.mark.parametrize("size", SIZES[:3])
def test_bfloat16_engine_stays_close(
    engine_bf16: OpenVinoEngine, reference: onnxruntime.InferenceSession, size: tuple[int, int]
) -> None:
    images = pair(*size)
    want = expected(reference, images)
    error = end_point_error(engine_bf16(*images), want).mean()
    assert 0 < error < 0.02 * np.linalg.norm(want, axis=-1).mean()


def test_narrow_images_run_in_float32(
    engine_fp32: OpenVinoEngine, engine_bf16: OpenVinoEngine
) -> None:
    """Sizes for which OpenVINO is wrong in bfloat16. (Its weights are rounded on every CPU.)"""
    narrow, wide = pair(128, 64), pair(64, 128)
    np.testing.assert_array_equal(engine_bf16(*narrow), engine_fp32(*narrow))
    assert np.abs(engine_bf16(*wide) - engine_fp32(*wide)).max() > 1e-3


def test_flow_of_a_pair_is_the_same_after_its_plan_was_evicted(
    onnx_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = 2 * onnx_file.stat().st_size / openvino_engine.PLANNED_SHARE
    monkeypatch.setattr(openvino_engine, "available_memory", lambda: memory)
    engine = OpenVinoEngine(onnx_file, precisions()[0])
    images = pair(100, 200)
    first = engine(*images)
    for size in ((64, 64), (64, 128), (128, 128)):
        engine(*pair(*size))
    np.testing.assert_array_equal(engine(*images), first)


SWEEP = [
    *itertools.product((16, 64, 100, 128, 192, 320, 512), repeat=2),
    *((length, side) for length in (8192, 16384) for side in (16, 64, 128)),
    *((side, length) for length in (8192, 16384) for side in (16, 64, 128)),
]


@pytest.mark.long
@pytest.mark.parametrize(
    ("precision", "limit"), [("fp32", 1e-3), pytest.param("bf16", 0.02, marks=needs_bfloat16)]
)
def test_every_network_is_right_at_every_size(
    exported: Exported, precision: str, limit: float
) -> None:
    """Against ONNX Runtime, which runs float32; twice, which must be the same."""
    if exported.half:
        pytest.skip("the CPU serves float32 files")
    engine = OpenVinoEngine(exported.file, precision)
    session = onnxruntime.InferenceSession(exported.file, providers=["CPUExecutionProvider"])
    for size in SWEEP:
        image1, image2 = pair(*size)
        want = expected(session, (image1, image2))[0]
        one, other = engine(np.repeat(image1, 2, 0), np.repeat(image2, 2, 0))
        np.testing.assert_array_equal(one, other, err_msg=str(size))
        error = end_point_error(one, want).mean() / np.linalg.norm(want, axis=-1).mean()
        print(f"{exported.name} {precision} {size}: {error:.1e}")
        assert error < limit, size


@pytest.mark.parametrize(
    ("flag", "expected"), [("avx512_bf16", ["bf16", "fp32"]), ("avx512f", ["fp32"])]
)
def test_bfloat16_is_preferred_if_the_cpu_has_it(
    monkeypatch: pytest.MonkeyPatch, flag: str, expected: list[str]
) -> None:
    monkeypatch.setattr(Path, "read_text", lambda self, **options: f"flags : fpu sse2 {flag}")
    assert precisions() == expected

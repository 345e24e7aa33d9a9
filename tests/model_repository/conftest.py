"""The shipped model, for all tests of its engines."""

from pathlib import Path

import onnxruntime
import pytest


@pytest.fixture(scope="package")
def onnx_file(shipped: Path) -> Path:
    """Its ONNX file."""
    return shipped / "flownet2" / "1" / "model.onnx"


@pytest.fixture(scope="package")
def reference(onnx_file: Path) -> onnxruntime.InferenceSession:
    """ONNX Runtime on the CPU, in float32."""
    return onnxruntime.InferenceSession(onnx_file, providers=["CPUExecutionProvider"])

"""The shipped model, for all tests of what runs it."""

from pathlib import Path

import onnxruntime
import pytest

from export.shipped import write_shipped


@pytest.fixture(scope="package")
def shipped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with the network that ships: C, a warp, S, each part of the big networks."""
    repository = tmp_path_factory.mktemp("repository")
    write_shipped(repository)
    return repository


@pytest.fixture(scope="package")
def onnx_file(shipped: Path) -> Path:
    """Its ONNX file."""
    return shipped / "flownet2" / "1" / "model.onnx"


@pytest.fixture(scope="package")
def reference(onnx_file: Path) -> onnxruntime.InferenceSession:
    """ONNX Runtime on the CPU, in float32."""
    return onnxruntime.InferenceSession(onnx_file, providers=["CPUExecutionProvider"])

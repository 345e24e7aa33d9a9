"""Exported files under ONNX Runtime against PyTorch, and the correlation function body against
brute force."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from scipy.ndimage import gaussian_filter

from export.graph import OPSET, correlation_function, export_onnx
from export.networks import NETWORKS
from export.weights import load_weights
from plugins.correlation_cases import (
    FLOWNET_CASES,
    GENERAL_CASES,
    Case,
    brute_force,
    tolerance,
)
from tests.support.caffe_reference import make_blobs, write_h5
from tests.support.correlation_model import one_node_model
from tests.support.exported import Exported


def session(proto: onnx.ModelProto) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(
        proto.SerializeToString(), providers=["CPUExecutionProvider"]
    )


def images(n: int, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(3)
    noise = gaussian_filter(rng.random((n, height + 4, width + 4, 3)), (0, 3, 3, 0))
    noise = (noise - noise.min()) / (noise.max() - noise.min()) * 255
    return noise[:, 2:-2, 2:-2].astype(np.uint8), noise[:, 4:, :-4].astype(np.uint8)


def test_the_contracts_graph(exported: Exported) -> None:
    proto = exported.proto
    shapes = {
        value.name: (
            value.type.tensor_type.elem_type,
            [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim],
        )
        for value in (*proto.graph.input, *proto.graph.output)
    }
    assert shapes == {
        "image1": (onnx.TensorProto.UINT8, ["batch", "height", "width", 3]),
        "image2": (onnx.TensorProto.UINT8, ["batch", "height", "width", 3]),
        "flow": (onnx.TensorProto.FLOAT, ["batch", "height", "width", 2]),
    }
    nodes = [node for node in proto.graph.node if node.domain == "flownet2"]
    assert len(nodes) == len(proto.functions) == exported.model.network.cascade.count("C")
    for node in nodes:
        assert node.op_type == "Correlation"
        assert {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute} == {
            "pad": 20,
            "kernel_size": 1,
            "max_displacement": 20,
            "stride1": 1,
            "stride2": 2,
            "plugin_version": b"1",
            "plugin_namespace": b"flownet2",
        }
    network = exported.model.network
    assert {entry.key: entry.value for entry in proto.metadata_props} == {
        "network": network.name,
        "width": str(network.width),
        "precision": "fp16" if exported.half else "fp32",
    }
    weights = {t.data_type for t in proto.graph.initializer if len(t.dims) == 4}
    assert weights == {onnx.TensorProto.FLOAT16 if exported.half else onnx.TensorProto.FLOAT}
    assert str(Path(__file__).parents[2]).encode() not in proto.SerializeToString()


def compare(
    run: onnxruntime.InferenceSession, exported: Exported, size: tuple[int, int, int]
) -> np.ndarray:
    """Return the distance of ONNX Runtime's flow from PyTorch's at each pixel, in pixels."""
    first, second = images(*size)
    (flow,) = run.run(None, {"image1": first, "image2": second})
    with torch.no_grad():
        expected = exported.model(torch.from_numpy(first), torch.from_numpy(second)).numpy()
    assert flow.shape == (*size, 2)
    assert flow.dtype == np.float32
    assert 0.001 < np.abs(expected).mean() < 40
    error = np.linalg.norm(flow - expected, axis=-1)
    if exported.half:
        assert error.mean() < 0.01 * np.linalg.norm(expected, axis=-1).mean()
    else:
        assert error.mean() < 1e-3
    return error


def test_onnx_runtime_gives_what_pytorch_gives(exported: Exported) -> None:
    run = session(exported.proto)
    large = [(1, 512, 512), (3, 388, 584), (1, 436, 1024)]
    for size in [(3, 75, 100), (1, 64, 64), (1, 16, 130)]:
        error = compare(run, exported, size)
        assert exported.half or error.max() < 1e-3
    for size in large if exported.name == "FlowNet2-cs" else []:
        assert compare(run, exported, size).max() < 1e-3


@pytest.mark.long
def test_onnx_runtime_at_every_size(exported: Exported) -> None:
    """The same for all networks at the sizes that people use; `make parity` prints the errors.

    Means are compared, not maxima: where a warp reads from just at the border of an image, rounding
    decides between a pixel and zero, and the flow around it moves by some hundredths of a pixel.
    """
    run = session(exported.proto)
    for height, width in ((75, 100), (388, 584), (512, 512), (436, 1024)):
        errors = [compare(run, exported, (n, height, width)) for n in (1, 3)]
        means, maxima = (
            " and ".join(f"{float(of(error)):.1e}" for error in errors) for of in (np.mean, np.max)
        )
        print(f"{exported.name} {height}x{width}: {means} px on average, {maxima} at most")


def test_caffe_weights_reach_the_file(tmp_path: Path) -> None:
    path = write_h5(tmp_path / "c.caffemodel.h5", make_blobs(["c"], 3 / 8))
    model, _ = load_weights(NETWORKS["FlowNet2-c"], path)
    stored = onnx.numpy_helper.to_array(
        next(t for t in export_onnx(model).graph.initializer if t.name.endswith("conv1.weight"))
    )
    np.testing.assert_array_equal(stored, make_blobs(["c"], 3 / 8)["conv1"][0])


# Each other case takes seconds to export; PyTorch's definition of it has tests of all.
@pytest.mark.parametrize(
    "case",
    [*FLOWNET_CASES, *(pytest.param(case, marks=pytest.mark.long) for case in GENERAL_CASES)],
    ids=lambda case: case.name,
)
def test_function_body_of_the_correlation(case: Case) -> None:
    a, b = case.inputs()
    body = correlation_function(case.attributes)
    run = session(one_node_model(case, np.float32, [body], opset=OPSET))
    (volume,) = run.run(None, {"a": a, "b": b})
    np.testing.assert_allclose(volume, brute_force(case, a, b), **tolerance(np.float32))

"""The graph passes, each compared with the graph before the pass."""

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx.inliner
import openvino
import pytest

from export.served.bfloat16 import cast_to_bfloat16, rounded
from export.served.cost_volume import (
    CostVolume,
    cost_volumes,
    divide_in_weights,
    multiply_in_blocks,
)
from export.served.image_planes import read_levels, read_whole_numbers, turn_bytes
from export.served.passes import Graph
from export.served.predictions import split_predictions
from export.served.resampling import remove_idle_resampling
from export.served.rewriting import BFLOAT16, channels, constant, fold_constants
from export.served.upsampling import upsample_by_gather
from export.served.widening import widen_concats
from export.shipped import shipped_model
from tests.support.exported import Exported
from tests.support.pairs import Images, end_point_error, pair
from tests.support.tiny_network import tiny_network


@pytest.fixture(scope="module")
def network() -> onnx.ModelProto:
    return shipped_model()[0]


@pytest.fixture
def model(network: onnx.ModelProto) -> openvino.Model:
    return read(network)


@pytest.fixture(scope="module")
def volume(network: onnx.ModelProto) -> CostVolume:
    (names,) = cost_volumes(network)
    return names


def read(network: onnx.ModelProto) -> openvino.Model:
    inlined = onnx.inliner.inline_local_functions(network)
    model = openvino.Core().read_model(inlined.SerializeToString())
    fold_constants(model)
    return model


def for_size(model: openvino.Model, size: tuple[int, int]) -> openvino.Model:
    fixed = model.clone()
    fixed.reshape({name: [1, *size, 3] for name in ("image1", "image2")})
    remove_idle_resampling(fixed)
    return fixed


def run_all(model: openvino.Model, pairs: list[tuple[Images, Images]]) -> Any:
    compiled = openvino.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    names = ("image1", "image2")
    return np.stack([compiled(dict(zip(names, images, strict=True)))[0] for images in pairs])


def run(model: openvino.Model, images: tuple[Images, Images]) -> Any:
    return run_all(model, [images])[0]


def kinds(model: openvino.Model) -> list[str]:
    return [node.get_type_name() for node in model.get_ordered_ops()]


def nodes(model: openvino.Model, *names: str) -> list[openvino.Node]:
    return [node for node in model.get_ordered_ops() if node.get_type_name() in names]


def assert_same_flow(
    before: openvino.Model, after: openvino.Model, size: tuple[int, int], limit: float = 2e-4
) -> None:
    images = pair(*size)
    want = run(before, images)
    assert np.abs(want).max() > 1  # or the comparison says nothing
    np.testing.assert_allclose(run(after, images), want, rtol=0, atol=limit)


def test_bytes_are_turned(model: openvino.Model) -> None:
    turned = model.clone()
    turn_bytes(turned)
    assert kinds(turned).count("Slice") == kinds(model).count("Slice") - 2
    assert_same_flow(model, turned, (75, 100), limit=0)


def test_convolutions_read_grey_levels(model: openvino.Model) -> None:
    levels = model.clone()
    read_levels(levels)
    assert kinds(levels).count("Multiply") == kinds(model).count("Multiply") + 2
    assert_same_flow(model, levels, (75, 100))


def test_transposed_convolutions_read_multiples_of_32_channels(model: openvino.Model) -> None:
    wide = model.clone()
    widen_concats(wide)
    read_by_upsampling = [
        channels(node.input_value(0))
        for node in nodes(wide, "ConvolutionBackpropData")
        if channels(node.input_value(0)) > 2
    ]
    assert read_by_upsampling == 2 * [384, 416, 320, 160]
    assert_same_flow(model, wide, (75, 100))


@pytest.mark.parametrize("size", [(75, 100), (64, 64), (128, 832), (320, 64)])
def test_cost_volume_is_multiplied_in_blocks(
    model: openvino.Model, volume: CostVolume, size: tuple[int, int]
) -> None:
    before = for_size(model, size)
    assert divide_in_weights(model, volume)
    assert_same_flow(before, for_size(model, size), size)
    blocks = for_size(model, size)
    multiply_in_blocks(blocks, volume)
    assert (kinds(before).count("MatMul"), kinds(blocks).count("MatMul")) == (21, 1)
    assert_same_flow(before, blocks, size)


def test_cost_volume_with_other_readers_is_left_alone(
    model: openvino.Model, volume: CostVolume
) -> None:
    other = CostVolume(volume.a, volume.b, volume.a)
    assert not divide_in_weights(model, other)
    assert kinds(for_size(model, (64, 64))).count("MatMul") == 21


@pytest.mark.parametrize("size", [(192, 320), (75, 100)])
def test_flow_is_upsampled_by_gathers(model: openvino.Model, size: tuple[int, int]) -> None:
    before = for_size(model, size)
    after = before.clone()
    upsample_by_gather(after)
    assert "Interpolate" in kinds(before)
    assert "Interpolate" not in kinds(after)
    assert_same_flow(before, after, size)


def test_predictions_are_two_convolutions(model: openvino.Model) -> None:
    changed = model.clone()
    split_predictions(changed)
    widths = [channels(node.output(0)) for node in nodes(changed, "Convolution")]
    assert widths.count(2) == widths.count(18) == 10  # five levels of two networks
    images = pair(75, 100)
    np.testing.assert_allclose(run(changed, images), run(model, images), atol=1e-4)


@pytest.mark.parametrize("size", [(192, 320), (75, 100)])
def test_bfloat16_convolutions_stay_close(model: openvino.Model, size: tuple[int, int]) -> None:
    cast = model.clone()
    cast_to_bfloat16(cast)
    images = pair(*size)
    want = run(model, images)
    error = end_point_error(run(for_size(cast, size), images), want).mean()
    assert 0 < error < 0.02 * np.linalg.norm(want, axis=-1).mean()


def test_flow_and_warp_stay_float32(model: openvino.Model) -> None:
    cast_to_bfloat16(model)
    bfloat16 = {
        node.get_type_name()
        for node in model.get_ordered_ops()
        if node.get_output_size() and node.get_output_element_type(0) == BFLOAT16
    }
    assert not {"Interpolate", "GridSample", "ReduceL2", "Subtract", "Divide"} & bfloat16
    assert {"Concat", "MatMul", "PRelu"} <= bfloat16  # features, the cost volume among them
    in_float32 = [
        (channels(node.input_value(0)), channels(node.output(0)))
        for node in nodes(model, "Convolution", "ConvolutionBackpropData")
        if node.get_output_element_type(0) != BFLOAT16
    ]
    # The finest prediction of both networks, and conv2 of the refining one.
    assert sorted(in_float32) == [(24, 48), (74, 2), (74, 2)]


@pytest.mark.parametrize("shape", [(64, 12, 7, 7), (32, 64, 3, 3), (48, 146, 4, 4)])
def test_rounded_kernels_keep_their_sums(shape: tuple[int, ...]) -> None:
    weights = np.random.default_rng(0).normal(scale=0.02, size=shape).astype(np.float32)
    weights[0, 0] = 0
    nearest = weights.astype(ml_dtypes.bfloat16).astype(np.float32)
    result = rounded(weights)
    np.testing.assert_array_equal(result.astype(ml_dtypes.bfloat16), result)
    # To one of the two neighbours: off by less than their distance.
    assert (np.abs(result - weights) <= np.abs(weights) * 2.0**-7).all()
    off, off_nearest = (np.abs((w - weights).sum((2, 3))) for w in (result, nearest))
    assert (off <= off_nearest + 1e-9).all()
    assert off.mean() < 0.2 * off_nearest.mean()


def test_biases_and_single_weights_are_rounded_to_the_nearest() -> None:
    for shape in ((1, 64, 1, 1), (32, 256, 1, 1), (256,)):
        numbers = np.random.default_rng(0).normal(size=shape).astype(np.float32)
        np.testing.assert_array_equal(rounded(numbers), numbers.astype(ml_dtypes.bfloat16))


@pytest.mark.parametrize("mean2", [0.45, 0.3])
@pytest.mark.parametrize(("size", "whole"), [((128, 192), 2), ((100, 192), 0)])
def test_convolutions_read_whole_numbers(
    network: onnx.ModelProto, mean2: float, size: tuple[int, int], whole: int
) -> None:
    """With equal and other means, at sizes with and without resampling."""
    other = onnx.ModelProto()
    other.CopyFrom(network)
    for tensor in other.graph.initializer:
        if tensor.name == "mean2":
            tensor.raw_data = np.full((3, 1, 1), mean2, "<f4").tobytes()
    exact = read(other)
    model = exact.clone()
    turn_bytes(model)
    read_levels(model)
    cast_to_bfloat16(model)
    before = for_size(model, size)
    after = before.clone()
    read_whole_numbers(after)
    pairs = [pair(*size, seed=seed) for seed in range(8)]  # the rounding of one is noise
    want = run_all(exact, pairs)
    errors = [end_point_error(run_all(each, pairs), want).mean() for each in (before, after)]
    assert errors[1] < 1.1 * errors[0]
    shifts = [
        constant(node.input_value(1)).ravel()
        for node in nodes(after, "Subtract")
        if constant(node.input_value(1)) is not None and constant(node.input_value(1)).min() > 1
    ]
    assert len(shifts) == 2 * whole
    assert all((shift == np.round(shift)).all() for shift in shifts)


@pytest.mark.parametrize("bfloat16", [False, True])
def test_every_network_keeps_its_flow(exported: Exported, bfloat16: bool) -> None:
    if exported.half:
        pytest.skip("the CPU serves float32 files")
    size = (64, 128)
    images = pair(*size)
    want = run(read(exported.proto), images)
    graph = Graph(exported.file, bfloat16, amx=True)
    error = end_point_error(run(graph.for_shape((1, *size, 3)), images), want).mean()
    assert error < (0.02 if bfloat16 else 1e-4) * np.linalg.norm(want, axis=-1).mean()


@pytest.mark.parametrize("bfloat16", [False, True])
def test_network_of_other_layers_keeps_its_flow(tmp_path: Path, bfloat16: bool) -> None:
    file = tmp_path / "model.onnx"
    onnx.save(tiny_network(), file)
    images = pair(64, 64)
    graph = Graph(file, bfloat16, amx=True)
    want = run(read(tiny_network()), images)
    np.testing.assert_allclose(run(graph.for_shape((1, 64, 64, 3)), images), want, atol=0.02)


def test_widening_is_for_amx(tmp_path: Path, network: onnx.ModelProto) -> None:
    file = tmp_path / "model.onnx"
    onnx.save(network, file)

    def widest(amx: bool) -> int:
        model = Graph(file, bfloat16=True, amx=amx).for_shape((1, 64, 64, 3))
        return max(
            channels(node.input_value(0)) for node in nodes(model, "ConvolutionBackpropData")
        )

    assert (widest(amx=False), widest(amx=True)) == (386, 416)

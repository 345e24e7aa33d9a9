"""The wide convolutions of an OpenVINO model in bfloat16, and everything else in float32."""

from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import openvino
from openvino import opset13 as ops
from openvino.passes import ConstantFolding, Manager

FLOW_CHANNELS = 2
# At most, what a layer reads that stays float32: images, the warped one, flow and errors (12), and
# what the thin networks make of them (24).
FEW_CHANNELS = 24
BF16 = openvino.Type.bf16
# What the correlation is made of, and joins it with the features beside it.
FOLLOWERS = {"Concat", "MatMul", "Multiply", "Pad", "PRelu", "Reshape", "Slice", "Transpose"}


def cast_to_bfloat16(model: openvino.Model) -> None:
    """Let the wide convolutions of a model run in bfloat16, in place.

    OpenVINO's own bfloat16 mode converts everything: flow of hundreds of pixels, the coordinates
    that the warp computes from it, then have 8 bits. Here a convolution with its bias and its
    LeakyReLU becomes bfloat16, sums inside it being float32 as ever, unless it predicts or
    upsamples a flow (two channels out) or reads few channels: the images and what is near them.
    These few layers would cost more than half of the accuracy lost, and in the thin networks the
    flow itself passes through them. What only moves or compares features that are
    bfloat16 already, up to the cost volume, stays bfloat16; images, flow and warp stay float32.
    """
    folding = Manager()
    folding.register_pass(ConstantFolding())  # leaves plain constants for biases and weights
    folding.run_passes(model)
    for node in model.get_ordered_ops():
        if node.get_type_name() in {"Convolution", "ConvolutionBackpropData"}:
            reads, gives = node.get_input_partial_shape(0)[1], node.get_output_partial_shape(0)[1]
            if gives != FLOW_CHANNELS and reads.get_length() > FEW_CHANNELS:
                _cast_nodes(_layer(node))
        elif node.get_type_name() in FOLLOWERS and _reads_bfloat16(node):
            _cast_nodes([node])
    model.validate_nodes_and_infer_types()


def _cast_nodes(chain: list[openvino.Node]) -> None:
    """Make nodes that feed only each other bfloat16; whoever reads the last gets it widened."""
    original = chain[-1].get_output_element_type(0).to_string()
    outputs = [(output, output.get_target_inputs()) for output in chain[-1].outputs()]
    for node in chain:
        # The slope of a LeakyReLU may stay float32, and 0.1 is not a number of bfloat16.
        arguments = node.inputs()[:1] if node.get_type_name() == "PRelu" else node.inputs()
        for argument in arguments:
            if argument.get_element_type().is_real():
                argument.replace_source_output(_as_bfloat16(argument.get_source_output()))
        node.validate_and_infer_types()
    for output, readers in outputs:
        widened = ops.convert(output, original).output(0)
        for reader in readers:
            reader.replace_source_output(widened)


def _reads_bfloat16(node: openvino.Node) -> bool:
    """True when all the numbers that a node reads, constants apart, are widened bfloat16."""
    sources = [
        argument.get_source_output()
        for argument in node.inputs()
        if argument.get_element_type().is_real()
    ]
    data = [one for one in sources if one.get_node().get_type_name() != "Constant"]
    return bool(data) and all(map(_is_widened, data))


def _is_widened(value: "openvino.Output[Any]") -> bool:
    node = value.get_node()
    return bool(
        node.get_type_name() == "Convert" and node.input_value(0).get_element_type() == BF16
    )


def _layer(convolution: openvino.Node) -> list[openvino.Node]:
    """A convolution with the bias and LeakyReLU that only they read."""
    layer = [convolution]
    while True:
        readers = list(layer[-1].output(0).get_target_inputs())
        if len(readers) != 1 or readers[0].get_node().get_type_name() not in {"Add", "PRelu"}:
            return layer
        layer.append(readers[0].get_node())


def _as_bfloat16(value: "openvino.Output[Any]") -> "openvino.Output[Any]":
    """The same value in bfloat16, through as few conversions as there can be."""
    if value.get_element_type() == BF16:
        return value
    if value.get_node().get_type_name() == "Constant":
        return ops.constant(_rounded(value.get_node().data), BF16).output(0)
    if _is_widened(value):
        return value.get_node().input_value(0)
    for reader in value.get_target_inputs():
        other = reader.get_node()
        if other.get_type_name() == "Convert" and other.get_output_element_type(0) == BF16:
            return other.output(0)
    return ops.convert(value, "bf16").output(0)


def _rounded(numbers: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    """The nearest numbers that bfloat16 has, of two as near the even one.

    OpenVINO rounds constants toward zero half of the time, which shrinks all weights a little and
    moved flows ten times as much.
    """
    return numbers.astype(ml_dtypes.bfloat16).astype(np.float32)

"""Conversion of a network's float32 file to half precision, for serving on GPUs.

Convolutions, and operators that only move their features, become float16. Images, flow and warp
stay float32: float16 cannot resolve the coordinates of the warp.
"""

from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from flownet2.errors import Error

COMPUTE = {"Conv", "ConvTranspose", "Correlation"}
FOLLOW = {"LeakyRelu", "Concat"}  # float16 if all their inputs are


class HalfError(Error):
    """Raised when a network cannot be converted to half precision."""


def to_half(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the float32 model with float16 blocks, and ``precision`` ``fp16`` in its metadata.

    Raises:
        HalfError: the network has control flow.
    """
    if any(
        a.type == onnx.AttributeProto.GRAPH for node in model.graph.node for a in node.attribute
    ):
        raise HalfError(
            "the network has loops or branches, which are not converted to half precision: export "
            "it with --precision fp32"
        )
    half = onnx.ModelProto()
    half.CopyFrom(model)
    weights = {tensor.name: tensor for tensor in half.graph.initializer}
    nodes: list[onnx.NodeProto] = []
    halves: set[str] = set()
    made: dict[str, onnx.TensorProto | None] = {}

    def converted(name: str, to: int) -> str:
        """Return the tensor's name in another type; add its conversion node at the first use."""
        new = f"{name}/{'half' if to == TensorProto.FLOAT16 else 'float'}"
        if new not in made:
            if name in weights:
                array = numpy_helper.to_array(weights[name]).astype(np.float16)
                made[new] = numpy_helper.from_array(array, new)
            else:
                made[new] = None
                nodes.append(helper.make_node("Cast", [name], [new], f"{new}/cast", to=to))
        return new

    for node in half.graph.node:
        is_block = node.op_type in COMPUTE or (
            node.op_type in FOLLOW and halves.issuperset(node.input)
        )
        for index, name in enumerate(node.input):
            if is_block and name not in halves:
                node.input[index] = converted(name, TensorProto.FLOAT16)
            elif not is_block and name in halves:
                node.input[index] = converted(name, TensorProto.FLOAT)
        if is_block:
            halves.update(node.output)
        nodes.append(node)

    read = {name for node in nodes for name in node.input}
    initializers = [weight for name, weight in weights.items() if name in read]
    initializers += [weight for weight in made.values() if weight]
    _replace(half.graph.initializer, initializers)
    _replace(half.graph.node, nodes)
    for function in half.functions:
        _compute_in_float(function)
    metadata = {entry.key: entry.value for entry in half.metadata_props}
    helper.set_model_props(half, metadata | {"precision": "fp16"})
    return half


def _compute_in_float(function: onnx.FunctionProto) -> None:
    """Let a float32 function read and return float16; the correlation sums in float32."""
    inside = {name: f"{name}/float" for name in function.input}
    outside = {name: f"{name}/float" for name in function.output}
    for node in function.node:
        _replace(node.input, [inside.get(name, name) for name in node.input])
        _replace(node.output, [outside.get(name, name) for name in node.output])
    before = [
        helper.make_node("Cast", [name], [new], to=TensorProto.FLOAT)
        for name, new in inside.items()
    ]
    after = [
        helper.make_node("Cast", [new], [name], to=TensorProto.FLOAT16)
        for name, new in outside.items()
    ]
    _replace(function.node, [*before, *function.node, *after])


def _replace(field: Any, values: list[Any]) -> None:
    """Replace the values of a repeated field."""
    values = list(values)
    del field[:]
    field.extend(values)

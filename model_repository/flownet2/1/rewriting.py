"""Helpers of the graph passes: inspect and rewire nodes of an OpenVINO model."""

from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt
import openvino
from openvino.passes import ConstantFolding, Manager

if TYPE_CHECKING:
    Value: TypeAlias = openvino.Output[Any]
    Argument: TypeAlias = openvino.Input[Any]
else:
    Value, Argument = openvino.Output, openvino.Input

BFLOAT16 = openvino.Type.bf16


def fold_constants(model: openvino.Model) -> None:
    """Compute the nodes that depend on no input of the model, in place."""
    manager = Manager()
    manager.register_pass(ConstantFolding())
    manager.run_passes(model)


def constant(value: Value) -> npt.NDArray[Any] | None:
    """Return a constant's numbers, bfloat16 as float32; None if the value is not a constant."""
    node = value.get_node()
    if node.get_type_name() != "Constant":
        return None
    # `data` of a bfloat16 constant is misread as float16.
    bfloat16 = node.get_element_type() == BFLOAT16
    numbers: npt.NDArray[Any] = node.get_data(dtype=np.float32) if bfloat16 else node.data
    return numbers


def readers(value: Value) -> list[openvino.Node]:
    """Return the nodes that read the numbers of a value (ShapeOf reads only its shape)."""
    nodes = [reader.get_node() for reader in value.get_target_inputs()]
    return [node for node in nodes if node.get_type_name() != "ShapeOf"]


def replace(old: Value, new: Value) -> None:
    """Let all readers of a value read another value."""
    for reader in old.get_target_inputs():
        reader.replace_source_output(new)


def channels(value: Value) -> int:
    """Return the number of channels of features ``[N, C, H, W]``; 0 if it is not fixed."""
    shape = value.get_partial_shape()
    if shape.rank != 4 or shape[1].is_dynamic:
        return 0
    return int(shape[1].get_length())


def source(value: Value, *kinds: str) -> Value | None:
    """Follow the first inputs back through nodes of these kinds; None if one differs."""
    for kind in kinds:
        node = value.get_node()
        if node.get_type_name() != kind:
            return None
        value = node.input_value(0)
    return value

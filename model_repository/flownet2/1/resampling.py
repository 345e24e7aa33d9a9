"""Removal of the resampling to multiples of 64 from an OpenVINO model of fixed shape."""

from typing import Any

import numpy as np
import numpy.typing as npt
import openvino
from openvino.passes import ConstantFolding, Manager


def remove_idle_resampling(model: openvino.Model) -> None:
    """Take out, in place, the resampling to multiples of 64 and back where sizes are that already.

    What it computes for known sizes are then gathers of every element in its place, products with
    one, and sums with products with zero.
    """
    folding = Manager()
    folding.register_pass(ConstantFolding())
    folding.run_passes(model)
    for node in model.get_ordered_ops():
        kept = _idle_input(node)
        if kept is not None:
            for reader in node.output(0).get_target_inputs():
                reader.replace_source_output(kept)


def _idle_input(node: openvino.Node) -> "openvino.Output[Any] | None":
    """The input that a node gives on unchanged, if it does."""
    kind, inputs = node.get_type_name(), node.input_values()
    if kind == "Gather":
        axis, index = (_constant(value) for value in (inputs[2], inputs[1]))
        if axis is not None and index is not None and index.ndim == 1:
            size = inputs[0].get_partial_shape()[int(axis)]
            if size == len(index) and (index == np.arange(len(index))).all():
                return inputs[0]
    if kind == "Multiply" and _is_all(inputs[1], 1):
        return inputs[0]
    if kind == "Add":
        for one, other in (inputs, inputs[::-1]):
            product = one.get_node()
            if product.get_type_name() == "Multiply" and _is_all(product.input_value(1), 0):
                return other
    return None


def _constant(value: "openvino.Output[Any]") -> npt.NDArray[Any] | None:
    node = value.get_node()
    return node.data if node.get_type_name() == "Constant" else None


def _is_all(value: "openvino.Output[Any]", number: float) -> bool:
    values = _constant(value)
    return values is not None and bool((values == number).all())

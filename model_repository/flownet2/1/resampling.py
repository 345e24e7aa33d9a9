"""Removal of the resampling to multiples of 64, for fixed shapes."""

import numpy as np
import openvino

from .rewriting import Value, constant, fold_constants, replace


def remove_idle_resampling(model: openvino.Model) -> None:
    """Remove the resampling to multiples of 64 and back if the sides are multiples, in place.

    For known sizes it consists of gathers of every element in its place, products with one, and
    sums with products with zero.
    """
    fold_constants(model)
    for node in model.get_ordered_ops():
        kept = _idle_input(node)
        if kept is not None:
            replace(node.output(0), kept)


def _idle_input(node: openvino.Node) -> Value | None:
    """Return the input that the node passes through unchanged, or None."""
    kind, inputs = node.get_type_name(), node.input_values()
    if kind == "Gather":
        axis, index = constant(inputs[2]), constant(inputs[1])
        if axis is not None and index is not None and index.ndim == 1:
            size = inputs[0].get_partial_shape()[int(axis)]
            if size == len(index) and (index == np.arange(len(index))).all():
                return inputs[0]
    if kind == "Multiply" and _is_all(inputs[1], 1):
        return inputs[0]
    if kind == "Add":
        for kept, other in (inputs, inputs[::-1]):
            product = other.get_node()
            if product.get_type_name() == "Multiply" and _is_all(product.input_value(1), 0):
                return kept
    return None


def _is_all(value: Value, number: float) -> bool:
    numbers = constant(value)
    return numbers is not None and bool((numbers == number).all())

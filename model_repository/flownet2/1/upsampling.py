"""Bilinear upsampling with aligned corners by gathers, for fixed shapes."""

import numpy as np
import openvino
from openvino import opset13 as ops

from .rewriting import Value, replace


def upsample_by_gather(model: openvino.Model) -> None:
    """Replace upsampling with aligned corners by gathers of neighbours, in place.

    Each axis, columns first, becomes ``x[i] + (x[i + 1] - x[i]) * f``: on two channels of flow,
    OpenVINO's Interpolate takes five times as long.

    Time with this pass, relative to without it: 0.97.
    """
    for node in model.get_ordered_ops():
        if node.get_type_name() == "Interpolate" and _is_aligned_upsampling(node):
            value = node.input_value(0)
            for axis in (3, 2):
                value = _upsampled(value, axis, node.get_output_shape(0)[axis])
            replace(node.output(0), value)
    model.validate_nodes_and_infer_types()


def _is_aligned_upsampling(node: openvino.Node) -> bool:
    attributes = node.get_attributes()
    if (
        attributes["mode"] != "linear_onnx"
        or attributes["coordinate_transformation_mode"] != "align_corners"
        or any((*attributes["pads_begin"], *attributes["pads_end"]))
        or node.get_output_partial_shape(0).is_dynamic
    ):
        return False
    before, after = node.get_input_shape(0), node.get_output_shape(0)
    return (
        len(before) == 4
        and before[:2] == after[:2]
        and all(1 < old <= new for old, new in zip(before[2:], after[2:], strict=True))
    )


def _upsampled(value: Value, axis: int, size: int) -> Value:
    last = value.get_shape()[axis] - 1
    position = np.arange(size) * last / (size - 1)
    index = np.minimum(position.astype(np.int32), last - 1)
    shape = [1, 1, 1, 1]
    shape[axis] = size
    fraction = (position - index).astype(np.float32).reshape(shape)
    near, far = (ops.gather(value, ops.constant(i), np.int32(axis)) for i in (index, index + 1))
    return ops.add(near, ops.multiply(ops.subtract(far, near), fraction)).output(0)

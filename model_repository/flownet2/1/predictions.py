"""Predictions of flow as two convolutions, which use the CPU's vectors better than one."""

import numpy as np
import numpy.typing as npt
import openvino
from openvino import opset13 as ops

from .rewriting import Value, constant, replace

FLOW_CHANNELS, SIDE = 2, 3
TAPS = SIDE * SIDE * FLOW_CHANNELS
GEOMETRY = {"strides": [1, 1], "pads_begin": [1, 1], "pads_end": [1, 1], "dilations": [1, 1]}


def split_predictions(model: openvino.Model) -> None:
    """Compute float32 predictions of flow by a 1x1 and a 3x3 convolution, in place.

    A convolution computes at least 16 output channels at a time, and a prediction has two. Its nine
    taps of two channels are 18 channels, and a convolution of these few channels adds them.

    Time with this pass, relative to without it: 0.97; of FlowNet2: 0.95.
    """
    for node in model.get_ordered_ops():
        if node.get_type_name() != "Convolution" or node.get_element_type() != openvino.Type.f32:
            continue
        weights = constant(node.input_value(1))
        attributes = node.get_attributes()
        if (
            weights is not None
            and (weights.shape[0], *weights.shape[2:]) == (FLOW_CHANNELS, SIDE, SIDE)
            and all(list(attributes[name]) == value for name, value in GEOMETRY.items())
            and attributes["auto_pad"] == "explicit"
        ):
            kernels = weights.transpose(2, 3, 0, 1).reshape(TAPS, -1, 1, 1)
            adding = np.eye(TAPS, dtype=np.float32).reshape(SIDE, SIDE, FLOW_CHANNELS, TAPS)
            taps = _convolution(node.input_value(0), kernels, padding=0)
            flow = _convolution(taps.output(0), adding.transpose(2, 3, 0, 1), padding=1)
            replace(node.output(0), flow.output(0))
    model.validate_nodes_and_infer_types()


def _convolution(value: Value, weights: npt.NDArray[np.float32], padding: int) -> openvino.Node:
    pads = [padding, padding]
    return ops.convolution(value, np.ascontiguousarray(weights), [1, 1], pads, pads, [1, 1])

"""An ONNX model of one Correlation node, for the tests of its implementations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from onnx import helper

from plugins.correlation_cases import Case

DOMAIN = "flownet2"


def one_node_model(
    case: Case,
    dtype: type[np.floating[Any]] = np.float32,
    functions: Sequence[onnx.FunctionProto] = (),
    opset: int = 17,
) -> onnx.ModelProto:
    """`a`, `b` -> `c` of `dtype`, every size dynamic, with the attributes of `case`.

    `functions` are its model-local functions; without one, the runtime needs the op.
    """
    element = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    node = helper.make_node(
        "Correlation",
        ["a", "b"],
        ["c"],
        domain=DOMAIN,
        plugin_version="1",
        plugin_namespace=DOMAIN,
        **case.attributes,
    )

    def value(name: str, prefix: str) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, element, [f"{prefix}{axis}" for axis in "nchw"])

    graph = helper.make_graph(
        [node], "correlation", [value("a", "in_"), value("b", "in_")], [value("c", "out_")]
    )
    return helper.make_model(
        graph,
        functions=list(functions),
        opset_imports=[helper.make_opsetid("", opset), helper.make_opsetid(DOMAIN, 1)],
        ir_version=10,
    )

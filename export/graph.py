"""Export of a network to one ONNX file with the contract's inputs and outputs.

The file holds ``Correlation`` as a node of the domain ``flownet2``, and beside it the same
operation as a model-local function in standard operators: a runtime with our kernel uses the
kernel, any other runtime inlines the function.
"""

import contextlib
import functools
import logging
import warnings
from collections.abc import Iterator
from typing import Any

import onnx
import torch
import torch._dynamo.config as dynamo_config
import torch.fx.experimental._config as fx_config
from onnx import helper
from onnx.defs import OpSchema
from onnxscript import values
from torch import Tensor, nn
from torch.export import Dim

from export.networks import FlowNet2, Network
from export.networks.operators import banded_correlation
from flownet2.contract import FLOW_OUTPUT, IMAGE_INPUTS

DOMAIN = "flownet2"
OPSET = 18
_INTEGERS = ("pad", "kernel_size", "max_displacement", "stride1", "stride2")
_TEXTS = ("plugin_version", "plugin_namespace")
CORRELATION = values.Op(
    values.Opset(DOMAIN, 1),
    "Correlation",
    OpSchema(
        "Correlation",
        DOMAIN,
        1,
        inputs=[OpSchema.FormalParameter("a", "T"), OpSchema.FormalParameter("b", "T")],
        outputs=[OpSchema.FormalParameter("volume", "T")],
        type_constraints=[("T", ["tensor(float)", "tensor(float16)"], "")],
        attributes=[
            *(OpSchema.Attribute(name, OpSchema.AttrType.INT, "") for name in _INTEGERS),
            *(OpSchema.Attribute(name, OpSchema.AttrType.STRING, "") for name in _TEXTS),
        ],
    ),
)
# Sizes that tracing may assume: at least two images and two tiles of 64 pixels, because it could
# treat axes of size 1 as broadcast. The exported graph has no such limit.
HEIGHT, WIDTH = Dim("height", min=65, max=16384), Dim("width", min=65, max=16384)
BATCH = Dim("batch", min=2, max=64)


def network_graph(network: Network) -> onnx.ModelProto:
    """Return a network's float32 graph without the values of its weights.

    Parameters and means are initializers by their names in :class:`FlowNet2`, with shape and type
    but no data; :mod:`export.shipped` fills them in.
    """
    model = FlowNet2(network)
    model.mean1.fill_(1)  # equal initializers would be merged
    model.mean2.fill_(2)
    proto = export_onnx(model)
    names = set(model.state_dict())
    for tensor in proto.graph.initializer:
        if tensor.name in names:
            tensor.ClearField("raw_data")
    return proto


def export_onnx(model: FlowNet2) -> onnx.ModelProto:
    """Export a network.

    Inputs ``image1``, ``image2``: uint8 ``[N, H, W, 3]`` RGB; output ``flow``: float32
    ``[N, H, W, 2]``; N, H and W dynamic. The metadata hold the ``network``, its ``width`` ("1" or
    "3/8") and the ``precision`` "fp32".
    """
    images = tuple(torch.zeros(2, 130, 200, 3, dtype=torch.uint8) for _ in range(2))
    shape = {0: BATCH, 1: HEIGHT, 2: WIDTH}
    proto = _export(model.eval(), images, (shape, shape), list(IMAGE_INPUTS), [FLOW_OUTPUT])
    for value in (*proto.graph.input, *proto.graph.output):
        for axis, name in enumerate(("batch", "height", "width")):
            value.type.tensor_type.shape.dim[axis].dim_param = name

    nodes = [node for node in proto.graph.node if node.domain == DOMAIN]
    if nodes:
        attributes = {a.name: helper.get_attribute_value(a) for a in nodes[0].attribute}
        proto.functions.append(correlation_function(attributes))
    network = model.network
    metadata = {"network": network.name, "width": str(network.width), "precision": "fp32"}
    helper.set_model_props(proto, metadata | model.semantics.metadata())
    onnx.checker.check_model(proto)
    return proto


def _correlation_node(
    a: Any, b: Any, pad: int, kernel_size: int, max_displacement: int, stride1: int, stride2: int
) -> Any:
    """Emit the correlation as a node; TensorRT finds its plugin by the last two attributes."""
    return CORRELATION(
        a,
        b,
        pad=pad,
        kernel_size=kernel_size,
        max_displacement=max_displacement,
        stride1=stride1,
        stride2=stride2,
        plugin_version="1",
        plugin_namespace=DOMAIN,
    )


class _BandedCorrelation(nn.Module):
    def __init__(self, attributes: dict[str, int]) -> None:
        super().__init__()
        self.attributes = attributes

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return banded_correlation(a, b, **self.attributes)


def correlation_function(attributes: dict[str, Any]) -> onnx.FunctionProto:
    """Return ``flownet2.Correlation`` in standard operators, for these values of its attributes.

    It is exported from the PyTorch formulation, so that there is only one definition.
    """
    numbers = tuple((k, v) for k, v in attributes.items() if not k.startswith("plugin_"))
    return helper.make_function(
        DOMAIN,
        "Correlation",
        ["a", "b"],
        ["volume"],
        _correlation_nodes(numbers),
        [helper.make_opsetid("", OPSET)],
        attributes=list(attributes),
    )


@functools.cache  # takes longer than a thin network
def _correlation_nodes(attributes: tuple[tuple[str, int], ...]) -> list[onnx.NodeProto]:
    numbers = dict(attributes)
    # Features must be larger than the border that the output lacks.
    border = numbers["max_displacement"] + numbers["kernel_size"] // 2 - numbers["pad"]
    least = 2 + 2 * max(border, 0)
    features = tuple(torch.zeros(2, 8, least + 22, least + 38) for _ in range(2))
    shape = {
        0: BATCH,
        1: Dim("channels", min=2, max=4096),
        2: Dim("rows", min=least, max=4096),
        3: Dim("columns", min=least, max=4096),
    }
    graph = _export(
        _BandedCorrelation(numbers), features, (shape, shape), ["a", "b"], ["volume"]
    ).graph
    for node in graph.node:  # TensorRT warns if the network uses the same names
        node.name = f"Correlation/{node.name}"
    constants = [
        helper.make_node("Constant", [], [tensor.name], value=tensor)
        for tensor in graph.initializer
    ]
    return [*constants, *graph.node]


def _export(
    module: nn.Module,
    inputs: tuple[Tensor, ...],
    shapes: tuple[dict[int, Any], ...],
    input_names: list[str],
    output_names: list[str],
) -> onnx.ModelProto:
    patched = fx_config.patch(backed_size_oblivious=True)  # type: ignore[attr-defined]
    # The cache compares symbolic shapes, which takes longer than to compute anew.
    uncached = dynamo_config.patch(fake_tensor_cache_enabled=False)
    with _quiet(), torch.no_grad(), patched, uncached:
        program = torch.export.export(
            module,
            inputs,
            dynamic_shapes=shapes,
            prefer_deferred_runtime_asserts_over_guards=True,
        )
        exported = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=OPSET,
            input_names=input_names,
            output_names=output_names,
            custom_translation_table={torch.ops.flownet2.correlation.default: _correlation_node},
            verbose=False,
        )
    assert exported is not None
    proto: onnx.ModelProto = exported.model_proto
    # The exporter stores the origin of each node, with paths of this machine.
    for node in (*proto.graph.node, *proto.graph.input, *proto.graph.output):
        del node.metadata_props[:]  # type: ignore[attr-defined]
    del proto.graph.value_info[:]
    return proto


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppress warnings of the exporter's own deprecations and of packages that we do not use."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)

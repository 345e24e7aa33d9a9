"""Wrap any two-image network's ONNX file into the contract, without PyTorch.

The wrapped file casts and normalises the images, pads or resizes them to sizes that the network
takes, runs the network, and crops or resizes the flow to the images' size.
"""

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import onnx
import onnx.compose
import onnx.inliner
import onnx.parser
import onnx.version_converter
from onnx import TensorProto

from flownet2.contract import FLOW_OUTPUT, IMAGE_INPUTS
from flownet2.errors import Error

RANGES = {"0..1": (1 / 255, 0.0), "0..255": (1.0, 0.0), "-1..1": (2 / 255, -1.0)}
"""Factor and offset of an 8-bit value."""

LEAST_OPSET, OPSET_LIMIT = 18, 20  # TensorRT reads GridSample of opset 20 as "nearest"
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CHANNELS_OF_STACK = 6


class WrapError(Error):
    """Raised when an ONNX file cannot be wrapped, or does not compute flow after that."""


@dataclass(frozen=True)
class ImageInput:
    """The images that a network takes.

    Attributes:
        range: values of the images before `mean` and `std`.
        mean, std: subtracted from the values, and divisor, in the network's channel order.
        multiple: number of which the sides have to be multiples.
        least: smallest side.
        fit: how images with other sides are fitted; "pad" repeats the edge on all sides.
    """

    range: str = "0..255"
    mean: tuple[float, ...] = (0.0, 0.0, 0.0)
    std: tuple[float, ...] = (1.0, 1.0, 1.0)
    bgr: bool = False
    multiple: int = 8
    least: int = 16
    fit: Literal["pad", "resize"] = "pad"


_RAFT = ImageInput("-1..1", least=128)  # the smallest of four scales of features is 2x2
_GMFLOW = ImageInput("0..1", IMAGENET_MEAN, IMAGENET_STD, multiple=32, least=64)
LIKE = {
    "raft": _RAFT,
    "sea-raft": _RAFT,
    "flowformer": _RAFT,
    "memflow": _RAFT,
    "gmflow": _GMFLOW,
    "unimatch": _GMFLOW,
    "neuflow": ImageInput("0..1", bgr=True, multiple=16, least=64, fit="resize"),
    "rapidflow": ImageInput("-1..1", bgr=True, multiple=32, least=64),
}


@dataclass
class Wrapped:
    """A network with the contract's inputs and output.

    Attributes:
        size: height and width that it computes at, if it takes no other size.
        parameters: number of its weights and biases.
    """

    model: onnx.ModelProto
    size: tuple[int, int] | None
    parameters: int


def wrap(
    path: Path,
    images: ImageInput,
    output: str | None = None,
    size: tuple[int, int] | None = None,
) -> Wrapped:
    """Wrap a network.

    Args:
        path: ONNX file with two float inputs ``[N, 3, H, W]``, or one ``[N, 6, H, W]`` or
            ``[N, 2, 3, H, W]``, and the flow ``[N, 2, H, W]`` or ``[N, 1, 2, H, W]`` among its
            outputs.
        output: name of the flow; needed if several outputs could be it.
        size: height and width to compute at, if the network is correct at no other size. Default:
            the size in the file, if its inputs have a fixed size.

    Raises:
        WrapError: the file is not such a network.
    """
    network = _read(path)
    inputs = _inputs(path, network)
    flow = _flow_output(path, network, output)
    dims = [dim.dim_value for dim in inputs[0].type.tensor_type.shape.dim]
    size = size or ((dims[-2], dims[-1]) if dims[-2] and dims[-1] else None)
    kind = TensorProto.DataType.Name(inputs[0].type.tensor_type.elem_type).lower()
    opset = next(o.version for o in network.opset_import if o.domain in ("", "ai.onnx"))
    header = f'<ir_version: {network.ir_version}, opset_import: ["" : {opset}]>'
    prepare = onnx.parser.parse_model(header + _prepare(images, len(dims), len(inputs), kind, size))
    finish = onnx.parser.parse_model(header + _finish(images, len(_shape(flow)), kind, size))
    given = [value.name for value in inputs]
    prepared = [value.name for value in prepare.graph.output][: len(given)]
    parameters = sum(
        math.prod(tensor.dims)
        for tensor in network.graph.initializer
        if tensor.data_type in (TensorProto.FLOAT, TensorProto.FLOAT16)
    )
    del network.graph.output[:]
    network.graph.output.append(flow)
    model = onnx.compose.merge_models(prepare, network, list(zip(prepared, given, strict=True)))
    model = onnx.compose.merge_models(
        model, finish, [(flow.name, "network_flow"), ("size", "to"), ("fitted", "from")]
    )
    del model.metadata_props[:], model.graph.value_info[:]
    return Wrapped(model, size, parameters)


def _read(path: Path) -> onnx.ModelProto:
    try:
        model = onnx.load(path)
        onnx.checker.check_model(model)
        model = onnx.inliner.inline_local_functions(model)
    except Exception as error:  # the errors of protobuf and ONNX have no common base
        raise WrapError(f"{path}: not an ONNX file that can be read: {_line(error)}") from error
    opset = next((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), 0)
    if not LEAST_OPSET <= opset < OPSET_LIMIT:
        target = LEAST_OPSET if opset < LEAST_OPSET else OPSET_LIMIT - 1
        try:
            model = onnx.version_converter.convert_version(model, target)
        except Exception as error:  # likewise
            raise WrapError(
                f"{path}: opset {opset} cannot be converted to {target}: {_line(error)}. Export "
                f"the network with opset_version={target}"
            ) from error
    del model.graph.value_info[:]
    return onnx.compose.add_prefix(model, "network/")


def _inputs(path: Path, network: onnx.ModelProto) -> list[onnx.ValueInfoProto]:
    constants = {tensor.name for tensor in network.graph.initializer}
    inputs = [value for value in network.graph.input if value.name not in constants]
    shapes = [_shape(value) for value in inputs]
    expected = {1: ((4, 1, 6), (5, 2, 3)), 2: ((4, 1, 3),)}.get(len(inputs), ())
    kinds = {value.type.tensor_type.elem_type for value in inputs}
    if not kinds <= {TensorProto.FLOAT, TensorProto.FLOAT16} or not any(
        all(len(shape) == rank and shape[axis] in (count, 0) for shape in shapes)
        for rank, axis, count in expected
    ):
        found = ", ".join(f"{_own(value.name)} {_shape(value)}" for value in inputs)
        raise WrapError(
            f"{path} takes {found}, but needs two float images [N, 3, H, W], or one stack of "
            "them, [N, 6, H, W] or [N, 2, 3, H, W]"
        )
    return inputs


def _flow_output(path: Path, network: onnx.ModelProto, name: str | None) -> onnx.ValueInfoProto:
    outputs = {_own(value.name): value for value in network.graph.output}
    flows = [
        key
        for key, value in outputs.items()
        if len(shape := _shape(value)) in (4, 5) and shape[-3] in (2, 0)
    ]
    if name is None and len(flows) == 1:
        name = flows[0]
    if name not in flows:
        raise WrapError(
            f"{path}: name the output that is the flow [N, 2, H, W] with --output; it has "
            + ", ".join(f"{key} {_shape(value)}" for key, value in outputs.items())
        )
    return outputs[name]


def _prepare(
    images: ImageInput, rank: int, count: int, kind: str, size: tuple[int, int] | None
) -> str:
    """Return the graph from the two images to the network's inputs, `size` and `fitted` size."""
    factor, offset = RANGES[images.range]
    factors = ", ".join(str(factor / std) for std in images.std)
    offsets = ", ".join(
        str((offset - mean) / std) for mean, std in zip(images.mean, images.std, strict=True)
    )
    nodes = [
        f"all = Shape({IMAGE_INPUTS[0]})",
        "size = Slice(all, one, three)",
        f"factor = Constant<value = float[1, 3, 1, 1] {{{factors}}}>()",
        f"offset = Constant<value = float[1, 3, 1, 1] {{{offsets}}}>()",
    ]
    if size:
        nodes += [f"fitted = Constant<value_ints = [{size[0]}, {size[1]}]>()"]
    else:
        nodes += [
            f"multiple = Constant<value_ints = [{images.multiple}]>()",
            f"least = Constant<value_ints = [{images.least}]>()",
            f"upto = Constant<value_ints = [{images.multiple - 1}]>()",
            "sum = Add(size, upto)",
            "tiles = Div(sum, multiple)",
            "rounded = Mul(tiles, multiple)",
            "fitted = Max(rounded, least)",
        ]
    if size or images.fit == "resize":
        nodes += [
            "batch_only = Slice(all, zero, one)",
            "sizes = Concat<axis = 0>(batch_only, three, fitted)",
        ]
    else:
        nodes += [
            "extra = Sub(fitted, size)",
            "before = Div(extra, two)",
            "after = Sub(extra, before)",
            "none = Constant<value_ints = [0, 0]>()",
            "pads = Concat<axis = 0>(none, before, none, after)",
        ]
    if images.bgr:
        nodes += ["order = Constant<value_ints = [2, 1, 0]>()"]
    for i, image in enumerate(IMAGE_INPUTS):
        nodes += [
            f"float{i} = Cast<to = {TensorProto.FLOAT}>({image})",
            f"ordered{i} = Gather<axis = 3>(float{i}, order)"
            if images.bgr
            else f"ordered{i} = Identity(float{i})",
            f"planes{i} = Transpose<perm = [0, 3, 1, 2]>(ordered{i})",
            f"scaled{i} = Mul(planes{i}, factor)",
            f"normal{i} = Add(scaled{i}, offset)",
            f'fit{i} = Resize<mode = "linear">(normal{i}, , , sizes)'
            if size or images.fit == "resize"
            else f'fit{i} = Pad<mode = "edge">(normal{i}, pads)',
        ]
    if count == 2:
        joined = ["fit0", "fit1"]
    elif rank == 5:
        nodes += [f"frame{i} = Unsqueeze(fit{i}, one)" for i in (0, 1)]
        nodes += ["joined = Concat<axis = 1>(frame0, frame1)"]
        joined = ["joined"]
    else:
        nodes += ["joined = Concat<axis = 1>(fit0, fit1)"]
        joined = ["joined"]
    nodes += [
        f"given{i} = Cast<to = {TensorProto.DataType.Value(kind.upper())}>({name})"
        for i, name in enumerate(joined)
    ]
    return _graph(
        "prepare",
        [f"uint8[batch, height, width, 3] {name}" for name in IMAGE_INPUTS],
        [*(f"{kind} given{i}" for i in range(len(joined))), "int64[2] size", "int64[2] fitted"],
        nodes,
    )


def _finish(images: ImageInput, rank: int, kind: str, size: tuple[int, int] | None) -> str:
    """Return the graph from the network's flow to that of the contract."""
    nodes = [f"float_flow = Cast<to = {TensorProto.FLOAT}>(network_flow)"]
    planes = "float_flow"
    if rank == 5:
        nodes += ["flow_planes = Squeeze(float_flow, flow_one)"]
        planes = "flow_planes"
    if size or images.fit == "resize":
        nodes += [
            f"flow_all = Shape({planes})",
            "flow_first = Slice(flow_all, flow_zero, flow_two)",
            "flow_sizes = Concat<axis = 0>(flow_first, to)",
            f'resized = Resize<mode = "linear">({planes}, , , flow_sizes)',
            f"to_float = Cast<to = {TensorProto.FLOAT}>(to)",
            f"from_float = Cast<to = {TensorProto.FLOAT}>(from)",
            "ratio = Div(to_float, from_float)",
            "xy = Constant<value_ints = [1, 0]>()",
            "ratio_xy = Gather<axis = 0>(ratio, xy)",
            "turned = Transpose<perm = [0, 2, 3, 1]>(resized)",
            f"{FLOW_OUTPUT} = Mul(turned, ratio_xy)",
        ]
    else:
        nodes += [
            "added = Sub(from, to)",
            "start = Div(added, flow_two)",
            "end = Add(start, to)",
            "axes = Constant<value_ints = [2, 3]>()",
            f"cropped = Slice({planes}, start, end, axes)",
            f"{FLOW_OUTPUT} = Transpose<perm = [0, 2, 3, 1]>(cropped)",
        ]
    return _graph(
        "finish",
        [f"{kind} network_flow", "int64[2] to", "int64[2] from"],
        [f"float[batch, height, width, 2] {FLOW_OUTPUT}"],
        nodes,
        prefix="flow_",
    )


def _graph(
    name: str, inputs: list[str], outputs: list[str], nodes: list[str], prefix: str = ""
) -> str:
    read = " ".join(nodes)
    constants = [
        f"{prefix}{word} = Constant<value_ints = [{i}]>()"
        for i, word in enumerate(("zero", "one", "two", "three"))
        if re.search(rf"\b{prefix}{word}\b", read)
    ]
    body = "\n".join([*constants, *nodes])
    return f"{name} ({', '.join(inputs)}) => ({', '.join(outputs)}) {{\n{body}\n}}"


def _shape(value: onnx.ValueInfoProto) -> list[int]:
    """Return the dimensions, 0 for a dimension that is not fixed."""
    return [dim.dim_value for dim in value.type.tensor_type.shape.dim]


def _own(name: str) -> str:
    return name.removeprefix("network/")


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]

"""Two-image networks of a few layers, in the forms of other projects' ONNX files."""

from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import onnx
from onnx import numpy_helper, parser

Array = npt.NDArray[np.float32]

WEIGHTS: Array = np.random.default_rng(0).normal(0, 0.2, (2, 6, 3, 3)).astype(np.float32)
BIAS: Array = np.array([8.0, -8.0], np.float32)  # the shift by which networks are checked


def write_network(
    path: Path,
    *,
    inputs: Literal["two", "channels", "frames"] = "two",
    size: tuple[int | str, int | str] = ("h", "w"),
    batch: int | str = "n",
    baked_width: int | None = None,
    opset: int = 17,
    weights: Array = WEIGHTS,
    second_output: bool = False,
    tensor: str = "float",
) -> Path:
    """Write a convolution of both images as the flow.

    Args:
        size: height and width of the images; names make them dynamic.
        baked_width: add a grid of coordinates about the centre of images of this width, like a
            network whose exporter stored a size as a constant.
        second_output: another output that could be the flow.
    """
    height, width = size
    image = f"{tensor}[{batch}, 3, {height}, {width}]"
    taken = {
        "two": f"{image} left, {image} right",
        "channels": f"{tensor}[{batch}, 6, {height}, {width}] stack",
        "frames": f"{tensor}[{batch}, 2, 3, {height}, {width}] frames",
    }[inputs]
    nodes = {
        "two": ["stack = Concat<axis = 1>(left, right)"],
        "channels": [],
        "frames": [
            "all = Shape(frames)",
            "start = Constant<value_ints = [3]>()",
            "end = Constant<value_ints = [5]>()",
            "sides = Slice(all, start, end)",
            "joined = Constant<value_ints = [0, 6]>()",
            "flat = Concat<axis = 0>(joined, sides)",
            "stack = Reshape(frames, flat)",
        ],
    }[inputs]
    convolved = "convolved" if baked_width or batch == 1 else "flow"
    nodes += [f"{convolved} = Conv<pads = [1, 1, 1, 1]>(stack, weights, bias)"]
    if baked_width:
        nodes += [
            "size = Shape(convolved)",
            "from = Constant<value_ints = [2]>()",
            "to = Constant<value_ints = [4]>()",
            "zero = Constant<value_ints = [0, 0]>()",
            "axes = Constant<value_ints = [2, 3]>()",
            "area = Slice(size, from, to)",
            "grid_here = Slice(grid, zero, area, axes)",
            "flow = Add(convolved, grid_here)",
        ]
    elif batch == 1:  # is in a constant, as exporters put it there
        nodes += [
            "size = Shape(convolved)",
            "from = Constant<value_ints = [1]>()",
            "to = Constant<value_ints = [4]>()",
            "rest = Slice(size, from, to)",
            "batch = Constant<value_ints = [1]>()",
            "flat_size = Concat<axis = 0>(batch, rest)",
            "flow = Reshape(convolved, flat_size)",
        ]
    flow = f"{tensor}[{batch}, 2, {height}, {width}]"
    outputs = f"{flow} flow"
    if second_output:
        nodes += ["coarse = Identity(flow)"]
        outputs = f"{flow} coarse, {outputs}"
    model = parser.parse_model(
        f'<ir_version: 8, opset_import: ["" : {opset}]> network ({taken}) => ({outputs}) '
        "{\n" + "\n".join(nodes) + "\n}"
    )
    kind = np.float16 if tensor == "float16" else np.float32
    values = {"weights": weights.astype(kind), "bias": BIAS.astype(kind)}
    if baked_width:
        x = np.arange(1024, dtype=kind) - kind(baked_width / 2)
        values["grid"] = np.broadcast_to(x / 8, (1, 2, 1024, 1024))
    model.graph.initializer.extend(numpy_helper.from_array(v, k) for k, v in values.items())
    onnx.save(model, path)
    return path

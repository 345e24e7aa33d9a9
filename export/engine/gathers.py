"""The warp of a network in gathers, for TensorRT.

TensorRT 10.14.1 and later are reported to compute a wrong float32 ``GridSample`` in half-precision
networks such as ours (pytorch/TensorRT issue 4074). Only the graph for TensorRT is rewritten,
because other engines are faster with ``GridSample``.
"""

import onnx
from onnx import helper, inliner, parser

DOMAIN, NAME = "flownet2", "WarpByGathers"
BORDER = {"mode": (b"bilinear", b"linear"), "padding_mode": (b"border",), "align_corners": (1,)}
BILINEAR = {"mode": b"bilinear"}  # the default of GridSample

# GridSample, bilinear, with border padding and aligned corners, from opset 16 on.
FUNCTION = """
<domain: "flownet2", opset_import: ["" : %d]>
WarpByGathers (image, grid) => (sampled)
{
  zero = Constant<value_ints = [0]>()
  one = Constant<value_ints = [1]>()
  two = Constant<value_ints = [2]>()
  three = Constant<value_ints = [3]>()
  four = Constant<value_ints = [4]>()
  minus = Constant<value_ints = [-1]>()
  turn = Constant<value_ints = [1, 0]>()
  each = Constant<value_ints = [1, 1]>()
  half = Constant<value_float = 0.5>()
  unit = Constant<value_float = 1.0>()
  origin = Constant<value_float = 0.0>()
  image_shape = Shape(image)
  channels = Slice(image_shape, zero, two)
  sides = Slice(image_shape, two, four)
  width = Slice(image_shape, three, four)
  size = Gather(sides, turn)
  last = Sub(size, one)
  last_float = Cast<to = 1>(last)
  shifted = Add(grid, unit)
  halved = Mul(shifted, half)
  scaled = Mul(halved, last_float)
  raised = Max(scaled, origin)
  at = Min(raised, last_float)
  low_float = Floor(at)
  part = Sub(at, low_float)
  low = Cast<to = 7>(low_float)
  next = Add(low, one)
  high = Min(next, last)
  x0, y0 = Split<axis = 3>(low, each)
  x1, y1 = Split<axis = 3>(high, each)
  px, py = Split<axis = 3>(part, each)
  batch = Slice(image_shape, zero, one)
  row = Concat<axis = 0>(batch, one, minus)
  all = Concat<axis = 0>(channels, minus)
  pixels = Reshape(image, all)
  grid_shape = Shape(grid)
  grid_sides = Slice(grid_shape, one, three)
  count = ReduceProd<keepdims = 1>(grid_sides)
  wide = Concat<axis = 0>(channels, count)
  upper = Mul(y0, width)
  lower = Mul(y1, width)
  i00 = Add(upper, x0)
  i01 = Add(upper, x1)
  i10 = Add(lower, x0)
  i11 = Add(lower, x1)
  r00 = Reshape(i00, row)
  r01 = Reshape(i01, row)
  r10 = Reshape(i10, row)
  r11 = Reshape(i11, row)
  e00 = Expand(r00, wide)
  e01 = Expand(r01, wide)
  e10 = Expand(r10, wide)
  e11 = Expand(r11, wide)
  v00 = GatherElements<axis = 2>(pixels, e00)
  v01 = GatherElements<axis = 2>(pixels, e01)
  v10 = GatherElements<axis = 2>(pixels, e10)
  v11 = GatherElements<axis = 2>(pixels, e11)
  right = Reshape(px, row)
  down = Reshape(py, row)
  d0 = Sub(v01, v00)
  m0 = Mul(d0, right)
  top = Add(v00, m0)
  d1 = Sub(v11, v10)
  m1 = Mul(d1, right)
  bottom = Add(v10, m1)
  d = Sub(bottom, top)
  m = Mul(d, down)
  flat = Add(top, m)
  output = Concat<axis = 0>(channels, grid_sides)
  sampled = Reshape(flat, output)
}
"""


def warp_by_gathers(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the model with gathers in place of the ``GridSample`` nodes of its warps."""
    warps = [node for node in model.graph.node if _is_warp(node)]
    if not warps:
        return model
    for node in warps:
        node.op_type, node.domain = NAME, DOMAIN
        del node.attribute[:]
    opsets = {opset.domain: opset.version for opset in model.opset_import}
    model.functions.append(parser.parse_function(FUNCTION % opsets[""]))
    if DOMAIN not in opsets:
        model.opset_import.append(helper.make_opsetid(DOMAIN, 1))
    # Each use gets different names; TensorRT warns about repeated names.
    return inliner.inline_selected_functions(model, [(DOMAIN, NAME)])


def _is_warp(node: onnx.NodeProto) -> bool:
    """Return whether a node is a ``GridSample`` with the attributes of a FlowNet2 warp."""
    if node.op_type != "GridSample":
        return False
    attributes = BILINEAR | {a.name: helper.get_attribute_value(a) for a in node.attribute}
    return all(attributes.get(key) in values for key, values in BORDER.items())

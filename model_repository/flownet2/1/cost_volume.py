"""The cost volume of FlowNetC as one product of matrices over blocks of positions.

The exported graph holds the correlation as 21 products, one for each vertical displacement, each
followed by a pad, two reshapes, a slice and a transpose that cut out its diagonals.
"""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx
import openvino
from onnx import helper
from openvino import opset13 as ops

from .rewriting import Value, channels, constant, readers, replace

ATTRIBUTES = {"pad": 20, "kernel_size": 1, "max_displacement": 20, "stride1": 1, "stride2": 2}
REACH = 20
SIDE = 21
"""Displacements of an axis: -20, -18 … 20."""

# Rows and columns of a block, in positions of one parity. A block is compared with all positions
# that any of its positions reaches; each needs 21 x 21 of them.
BLOCK = (4, 16)


@dataclass(frozen=True)
class CostVolume:
    """Tensor names of a correlation: features ``[N, C, H, W]``, volume ``[N, 441, H, W]``."""

    a: str
    b: str
    volume: str


def cost_volumes(network: onnx.ModelProto) -> list[CostVolume]:
    """Find the correlations of an exported network that have FlowNetC's attributes."""
    return [
        CostVolume(*node.input, *node.output)
        for node in network.graph.node
        if (node.domain, node.op_type) == ("flownet2", "Correlation")
        and ATTRIBUTES.items()
        <= {each.name: helper.get_attribute_value(each) for each in node.attribute}.items()
    ]


def divide_in_weights(model: openvino.Model, names: CostVolume) -> bool:
    """Divide by the number of channels in the weights that read the volume, in place.

    The exported graph multiplies both feature maps by ``C ** -0.5`` instead. Between the volume and
    the weights lies a LeakyReLU, which commutes with a positive factor.

    It saves no time by itself, but one rounding of the bfloat16 features.

    Returns:
        False if the graph around the volume has another form; it is then not changed.
    """
    a, b, volume = _values(model, names)
    factors = [*_factors(a), *_factors(b)]
    activated = _only_reader(volume, "PRelu")
    joined = _only_reader(activated, "Concat")
    if len(factors) != 2 or activated is None or joined is None:
        return False
    layers = readers(joined)
    if {layer.get_type_name() for layer in layers} != {"Convolution"}:
        return False
    parts = joined.get_node().input_values()
    first = sum(map(channels, parts[: parts.index(activated)]))
    for layer in layers:
        weights = np.array(constant(layer.input_value(1)))
        weights[:, first : first + SIDE**2] /= channels(a)
        layer.input(1).replace_source_output(ops.constant(weights).output(0))
    for factor in factors:
        replace(factor.output(0), factor.input_value(0))
    model.validate_nodes_and_infer_types()
    return True


def multiply_in_blocks(model: openvino.Model, names: CostVolume) -> None:
    """Compute a cost volume (not divided by its channels) by one product of blocks, in place.

    Positions are only compared with positions of the same parity of row and column. For each
    parity, the positions of ``a`` are cut into blocks, and a block is compared with the positions
    of ``b`` from ten before it to ten behind it. A Gather then picks each position's own 21 x 21.

    Time with this pass, relative to without it: 0.90 in bfloat16, 0.93 in float32.

    Args:
        model: with inputs of a fixed shape and a batch of one.
    """
    a, b, volume = _values(model, names)
    size, depth, height, width = a.get_shape()
    relu = readers(volume)[0]
    if size != 1 or height % 2 or width % 2:
        return
    rows, columns = height // 2, width // 2
    block_rows, block_columns = (
        _divisor(side, near) for side, near in zip((rows, columns), BLOCK, strict=True)
    )
    down, across = rows // block_rows, columns // block_columns

    blocks = _reshaped(
        _channels_last(a), [down, block_rows, 2, across, block_columns, 2, depth]
    )  # [row of blocks, row, parity, column of blocks, column, parity, C]
    blocks = _transposed(blocks, [2, 5, 0, 3, 1, 4, 6])
    blocks = _reshaped(blocks, [4 * down * across, block_rows * block_columns, depth])

    border = _integers([0, 0, REACH, REACH])
    zero = ops.convert(ops.constant(np.float32(0)), a.get_element_type().to_string())
    others = _channels_last(ops.pad(b, border, border, "constant", zero).output(0))
    others = _reshaped(others, [rows + REACH, 2, columns + REACH, 2, depth])
    others = _transposed(others, [1, 3, 0, 2, 4])
    others = _reshaped(others, [4, (rows + REACH) * (columns + REACH), depth])
    reach_rows, reach_columns = block_rows + REACH, block_columns + REACH
    i, j, y, x = np.ogrid[:down, :across, :reach_rows, :reach_columns]
    reached = (i * block_rows + y) * (columns + REACH) + j * block_columns + x
    others = ops.gather(others, _integers(reached.ravel()), _integers(1)).output(0)
    others = _reshaped(others, [4 * down * across, reach_rows * reach_columns, depth])

    products = _reshaped(ops.matmul(blocks, others, False, True).output(0), [-1])
    y, x, dy, dx = np.ogrid[:height, :width, :SIDE, :SIDE]
    (i, row), (j, column) = divmod(y // 2, block_rows), divmod(x // 2, block_columns)
    block = ((y % 2 * 2 + x % 2) * down + i) * across + j
    position = (block * block_rows + row) * block_columns + column
    index = (position * reach_rows + row + dy) * reach_columns + column + dx
    cost = ops.gather(products, _integers(index.reshape(1, height, width, -1)), _integers(0))
    # With the LeakyReLU where the channels still come last.
    cost = ops.prelu(cost, relu.input_value(1))
    replace(relu.output(0), _transposed(cost.output(0), [0, 3, 1, 2]))
    model.validate_nodes_and_infer_types()


def _values(model: openvino.Model, names: CostVolume) -> list[Value]:
    """Find features and volume in a model."""
    values = {
        name: value
        for node in model.get_ops()
        for value in node.outputs()
        for name in value.get_names()
    }
    return [values[name] for name in (names.a, names.b, names.volume)]


def _factors(features: Value) -> list[openvino.Node]:
    """Return the products of features with ``C ** -0.5``."""
    return [
        reader
        for reader in readers(features)
        if reader.get_type_name() == "Multiply"
        and (factor := constant(reader.input_value(1))) is not None
        and factor.size == 1
        and math.isclose(factor.item(), channels(features) ** -0.5, rel_tol=1e-6)
    ]


def _only_reader(value: Value | None, kind: str) -> Value | None:
    """Return the output of the only node that reads a value, if it is of this kind."""
    nodes = readers(value) if value else []
    return nodes[0].output(0) if [node.get_type_name() for node in nodes] == [kind] else None


def _divisor(number: int, near: int) -> int:
    """Return the divisor of `number` whose ratio to `near` is closest to 1."""
    divisors = (each for each in range(1, number + 1) if number % each == 0)
    return min(divisors, key=lambda each: abs(math.log(each / near)))


def _integers(numbers: npt.ArrayLike) -> openvino.Node:
    return ops.constant(np.asarray(numbers, np.int32))


def _channels_last(features: Value) -> Value:
    return _transposed(features, [0, 2, 3, 1])


def _transposed(value: Value, order: list[int]) -> Value:
    return ops.transpose(value, _integers(order)).output(0)


def _reshaped(value: Value, shape: list[int]) -> Value:
    return ops.reshape(value, _integers(shape), False).output(0)

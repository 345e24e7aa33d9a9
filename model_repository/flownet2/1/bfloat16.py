"""The convolutions of an OpenVINO model in bfloat16, and everything else in float32."""

from concurrent.futures import ThreadPoolExecutor

import ml_dtypes
import numpy as np
import numpy.typing as npt
import openvino
from openvino import opset13 as ops

from .predictions import FLOW_CHANNELS
from .rewriting import BFLOAT16, Value, channels, constant, readers, replace

CONVOLUTIONS = {"Convolution", "ConvolutionBackpropData"}
# A network whose second convolution reads at most this many channels is a thin refining network: a
# few of these channels carry the flow that its first convolution read.
FEW_CHANNELS = 24
REFINING_CHANNELS = 12  # two images, the warped one, flow and brightness error
# The nodes of the correlation, and the nodes around it.
FOLLOWERS = {"Concat", "MatMul", "Multiply", "Pad", "PRelu", "Reshape", "Slice", "Transpose"}
KERNEL_WEIGHTS = 2**17  # rounded at once: what fits in a cache

Numbers = npt.NDArray[np.float32]


def cast_to_bfloat16(model: openvino.Model) -> None:
    """Let the convolutions of a model run in bfloat16, in place.

    OpenVINO's own bfloat16 mode converts everything: flow of hundreds of pixels, the coordinates
    that the warp computes from it, then have 8 bits. Here each convolution, with its bias and
    LeakyReLU, becomes bfloat16; its sums stay float32. So do the operations up to the cost volume
    that only move or compare such features. Images, full-size flow and warp stay float32. Each
    network's finest prediction and, in thin refining networks, the convolution that passes the flow
    on stay float32 too, because in bfloat16 they would raise the error by more than a half.

    Time relative to float32, with AMX: 0.48.
    """
    for node in model.get_ordered_ops():
        if node.get_type_name() in CONVOLUTIONS:
            if not (_is_finest_prediction(node) or _passes_flow_on(node)):
                _cast(_layer(node))
        elif node.get_type_name() in FOLLOWERS and _reads_bfloat16(node):
            _cast([node])
    for node in model.get_ordered_ops():
        if node.get_type_name() == "Concat":
            _cast_before(node)
    model.validate_nodes_and_infer_types()


def _is_finest_prediction(node: openvino.Node) -> bool:
    """Return True for a convolution that predicts a flow which no layer upsamples."""
    if node.get_type_name() != "Convolution" or channels(node.output(0)) != FLOW_CHANNELS:
        return False
    kinds = {reader.get_type_name() for reader in readers(_layer(node)[-1].output(0))}
    return "ConvolutionBackpropData" not in kinds


def _passes_flow_on(node: openvino.Node) -> bool:
    """Return True for the second convolution of a thin refining network."""
    value = node.input_value(0)
    if node.get_type_name() != "Convolution" or channels(value) > FEW_CHANNELS:
        return False
    while value.get_node().get_type_name() in {"Add", "Convert", "PRelu"}:
        value = value.get_node().input_value(0)
    first = value.get_node()
    return (
        first.get_type_name() == "Convolution"
        and channels(first.input_value(0)) == REFINING_CHANNELS
    )


def _layer(convolution: openvino.Node) -> list[openvino.Node]:
    """Return a convolution with the bias and the LeakyReLU that only they read."""
    layer = [convolution]
    while True:
        nodes = readers(layer[-1].output(0))
        if len(nodes) != 1 or nodes[0].get_type_name() not in {"Add", "PRelu"}:
            return layer
        if constant(nodes[0].input_value(1)) is None:
            return layer
        layer.append(nodes[0])


def _cast(chain: list[openvino.Node]) -> None:
    """Make nodes that feed only each other bfloat16; readers of the last get it widened."""
    result = chain[-1].output(0)
    targets = result.get_target_inputs()
    for node in chain:
        # The slope of a LeakyReLU may stay float32, and 0.1 is not representable in bfloat16.
        arguments = node.inputs()[:1] if node.get_type_name() == "PRelu" else node.inputs()
        for argument in arguments:
            if argument.get_element_type().is_real():
                argument.replace_source_output(_as_bfloat16(argument.get_source_output()))
        node.validate_and_infer_types()
    widened = ops.convert(result, "f32").output(0)
    for target in targets:
        target.replace_source_output(widened)


def _cast_before(concat: openvino.Node) -> None:
    """Convert the inputs of a Concat instead of its output, if all its readers are bfloat16."""
    nodes = readers(concat.output(0))
    if nodes and all(_is_narrowing(node) for node in nodes):
        for argument in concat.inputs():
            argument.replace_source_output(_as_bfloat16(argument.get_source_output()))
        concat.validate_and_infer_types()
        for node in nodes:
            replace(node.output(0), concat.output(0))


def _reads_bfloat16(node: openvino.Node) -> bool:
    """Return True if all inputs of a node except constants are widened bfloat16."""
    values = [
        argument.get_source_output()
        for argument in node.inputs()
        if argument.get_element_type().is_real()
    ]
    data = [value for value in values if value.get_node().get_type_name() != "Constant"]
    return bool(data) and all(map(_is_widened, data))


def _is_widened(value: Value) -> bool:
    node = value.get_node()
    return bool(
        node.get_type_name() == "Convert" and node.input_value(0).get_element_type() == BFLOAT16
    )


def _is_narrowing(node: openvino.Node) -> bool:
    return bool(node.get_type_name() == "Convert" and node.get_output_element_type(0) == BFLOAT16)


def _as_bfloat16(value: Value) -> Value:
    """Return a value in bfloat16, through as few conversions as possible."""
    if value.get_element_type() == BFLOAT16:
        return value
    numbers = constant(value)
    if numbers is not None:
        return ops.constant(rounded(numbers), BFLOAT16).output(0)
    if _is_widened(value):
        return value.get_node().input_value(0)
    for node in readers(value):
        if _is_narrowing(node):
            return node.output(0)
    return ops.convert(value, "bf16").output(0)


def rounded(numbers: Numbers) -> Numbers:
    """Round to bfloat16, kernels ``[.., .., kh, kw]`` so that their sums stay nearly the same.

    If each weight is rounded to the nearest number, the sum of a kernel is off by about one unit of
    its weights, which shifts a slowly varying feature as a whole. Therefore the weights of a kernel
    that are nearest to the middle of two numbers are rounded the other way, as long as that
    improves the sum.

    OpenVINO's own conversion rounds toward zero half of the time, which shrinks all weights.
    """
    taps = numbers.shape[2] * numbers.shape[3] if numbers.ndim == 4 else 1
    if taps == 1:
        return _nearest(numbers)
    kernels = numbers.reshape(-1, taps)
    result = np.empty_like(kernels)
    size = KERNEL_WEIGHTS // taps

    def round_part(first: int) -> None:
        part = slice(first, first + size)
        result[part] = _keep_sums(np.ascontiguousarray(kernels[part].T)).T

    with ThreadPoolExecutor(2) as threads:
        list(threads.map(round_part, range(0, len(kernels), size)))
    return result.reshape(numbers.shape)


def _keep_sums(kernels: Numbers) -> Numbers:
    """Round kernels ``[taps, kernels]`` to bfloat16, keeping the sum of each."""
    result = _nearest(kernels)
    error = kernels - result
    step = _farther(result, error) - result
    with np.errstate(divide="ignore", invalid="ignore"):
        middle = error / step  # 0 … 0.5, which is the middle of two numbers
    middle[error == 0] = 0
    off = error.sum(axis=0)
    kernel = np.arange(kernels.shape[1])
    while len(kernel):
        useful = middle * (np.abs(off - step) < np.abs(off))
        tap = useful.argmax(axis=0)
        moved = np.flatnonzero(useful[tap, np.arange(len(kernel))])
        tap, kernel = tap[moved], kernel[moved]
        middle[tap, moved] = 0
        off = off[moved] - step[tap, moved]
        result[tap, kernel] += step[tap, moved]
        step, middle = step.take(moved, axis=1), middle.take(moved, axis=1)
    return result


def _nearest(numbers: Numbers) -> Numbers:
    nearest: Numbers = numbers.astype(ml_dtypes.bfloat16).astype(np.float32)
    return nearest


def _farther(nearest: Numbers, error: Numbers) -> Numbers:
    """Return the neighbours of bfloat16 numbers on the side of their errors."""
    bits = nearest.astype(ml_dtypes.bfloat16).view(np.uint16)
    outward = np.signbit(error) == np.signbit(nearest)
    neighbours = np.where(outward, bits + np.uint16(1), bits - np.uint16(1))
    farther: Numbers = neighbours.view(ml_dtypes.bfloat16).astype(np.float32)
    return farther

"""Triton Python-backend model: runs the ``model.onnx`` beside it on the CPU.

The exporter copies the modules of this folder to ``<model>/1/``, and ``flownet2/contract.py``: they
import nothing else of the project.

Engine, chosen in :class:`Engine` and nowhere else: OpenVINO, which ran the networks faster than
ONNX Runtime did on every CPU that was measured (``make bench`` repeats it). Where the CPU
multiplies bfloat16 in hardware, the wide convolutions run in bfloat16, which halves the time. All
that carries flow stays float32, see :func:`cast_to_bfloat16`. Elsewhere everything is float32.
"""

import contextlib
import ctypes
import functools
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# NVIDIA's container honours PYTHONPATH, the stub of the PyPI wheel runs isolated and does not.
sys.path[:0] = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))

import numpy as np  # noqa: E402
import numpy.typing as npt  # noqa: E402
import onnx  # noqa: E402
import onnx.inliner  # noqa: E402
import openvino  # noqa: E402

from flownet2.contract import FLOW_OUTPUT, GRID, IMAGE_INPUTS, MINIMUM_SIDE, adapted  # noqa: E402

from .bfloat16 import cast_to_bfloat16  # noqa: E402
from .shapes import guard, is_possible  # noqa: E402

with contextlib.suppress(ModuleNotFoundError):  # exists in Triton's stub alone
    import triton_python_backend_utils as pb_utils

Images = npt.NDArray[np.uint8]
Flow = npt.NDArray[np.float32]

Shape = tuple[int, ...]

USUAL_SHAPE = (1, *GRID, 3)  # what the gateway's default path asks for
# OpenVINO 2026.4.1 on a Xeon with AMX, bfloat16, images at most 64 wide and thousands high (black
# from 64x12288, with texture from 64x8192): flow of 1e28, or not finite, or another at each call.
# The deepest features are then one column wide. Right are float32, bfloat16 from 128 wide, and wide
# images 64 high. Which convolution is the first to be wrong is not known: a report upstream needs
# that, and a CPU with AMX to find it.
BFLOAT16_WIDTH = 128


class Engine:
    """A network, ready to run.

    Attributes:
        precision: "bf16" or "f32", that of the wide convolutions.
    """

    def __init__(self, path: Path, precision: str | None = None) -> None:
        """Read and compile an exported network.

        Args:
            path: the exporter's ``model.onnx``.
            precision: "bf16" or "f32" instead of what suits this CPU.
        """
        self.precision = precision or ("bf16" if has_bfloat16() else "f32")
        self._path = path
        model = _read(path, self.precision)
        self._any_shape = _compile(model)
        # A graph for one shape is planned ahead, which saves about a tenth on the usual one.
        model.reshape({name: list(USUAL_SHAPE) for name in IMAGE_INPUTS})
        remove_idle_resizes(model)
        self._usual_shape = _compile(model)

    def __call__(self, image1: Images, image2: Images) -> Flow:
        """Flow from ``image1`` to ``image2``.

        The pairs of a batch run one after the other: together they take longer, and more memory.

        Args:
            image1, image2: ``[N, H, W, 3]``, RGB.

        Returns:
            ``[N, H, W, 2]`` in pixels.
        """
        request = self._request((1, *image1.shape[1:]))
        flow = np.empty((*image1.shape[:3], 2), np.float32)
        for one, other, result in zip(image1, image2, flow, strict=True):
            images = dict(zip(IMAGE_INPUTS, (one[None], other[None]), strict=True))
            result[...] = request.infer(images, share_inputs=True, share_outputs=True)[0]
        return flow

    def _request(self, shape: Shape) -> openvino.InferRequest:
        if shape == USUAL_SHAPE:
            return self._usual_shape
        if self.precision == "bf16" and adapted(shape[2]) < BFLOAT16_WIDTH:
            return self._narrow
        return self._any_shape

    @functools.cached_property
    def _narrow(self) -> openvino.InferRequest:
        return _compile(_read(self._path, "f32"))


def has_bfloat16() -> bool:
    """True where the CPU has bfloat16 arithmetic (OpenVINO would emulate it elsewhere)."""
    flags = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").split()
    return not {"avx512_bf16", "amx_bf16"}.isdisjoint(flags)


def available_cores() -> int:
    """Cores that this process may use: its affinity, and a container's quota."""
    cores = len(os.sched_getaffinity(0))
    with contextlib.suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
        cores = min(cores, math.ceil(int(quota) / int(period)))  # ValueError: "max", no quota
    return max(cores, 1)


def _read(path: Path, precision: str) -> openvino.Model:
    # OpenVINO knows neither our op nor model-local functions: put the function's body in place.
    inlined = onnx.inliner.inline_local_functions(onnx.load(path))
    model = openvino.Core().read_model(inlined.SerializeToString())
    if precision == "bf16":
        cast_to_bfloat16(model)
    return model


def _compile(model: openvino.Model) -> openvino.InferRequest:
    return openvino.compile_model(
        model,
        "CPU",
        {
            "INFERENCE_PRECISION_HINT": "f32",  # as the graph says, where it may be bfloat16
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": "1",
            "INFERENCE_NUM_THREADS": str(available_cores()),
            "ENABLE_HYPER_THREADING": "NO",  # two threads share one core's multipliers
            "ENABLE_CPU_PINNING": "NO",  # other processes share the machine
        },
    ).create_infer_request()


def remove_idle_resizes(model: openvino.Model) -> None:
    """Take out, in place, the resizing to multiples of 64 and back where sizes are that already."""
    for node in model.get_ordered_ops():
        if node.get_type_name() == "Interpolate":
            before, after = node.get_input_partial_shape(0), node.get_output_partial_shape(0)
            if before.is_static and before == after:
                for reader in node.output(0).get_target_inputs():
                    reader.replace_source_output(node.input_value(0))


class Lent:
    """An array as Triton's stub can take it over, without a copy, whatever NumPy is installed.

    The stub is compiled against NumPy 1 and misreads arrays of NumPy 2; DLPack is common ground.
    But it marks a capsule as consumed by another name than NumPy looks for, of which NumPy would
    complain on stderr at every request: the name is set right here.
    """

    def __init__(self, array: Flow) -> None:
        """Lend an array."""
        self._array = array
        self._capsule: Any = None

    def __dlpack__(self, **options: Any) -> Any:
        self._capsule = self._array.__dlpack__(**options)
        return self._capsule

    def __dlpack_device__(self) -> tuple[int, int]:
        return self._array.__dlpack_device__()

    def __del__(self) -> None:
        if self._capsule is not None:
            ctypes.pythonapi.PyCapsule_SetName(ctypes.py_object(self._capsule), b"used_dltensor")


class TritonPythonModel:
    """What Triton's Python backend calls."""

    def initialize(self, arguments: dict[str, str]) -> None:
        """Load the network."""
        guard(pb_utils.Tensor)
        folder = Path(arguments["model_repository"]) / arguments["model_version"]
        self.engine = Engine(folder / "model.onnx")
        pb_utils.Logger.log_info(
            f"{arguments['model_name']} on OpenVINO {openvino.get_version()}, "
            f"{self.engine.precision}, {available_cores()} threads"
        )

    def execute(self, requests: list[Any]) -> list[Any]:
        """Run a batch that Triton formed as one batch of the engine.

        Triton joins only requests of one shape. A request whose two images differ in size, or are
        too small, is answered with an error of its own; a cancelled one is not computed.
        """
        responses: list[Any] = [None] * len(requests)
        accepted: list[tuple[int, Images, Images]] = []
        for index, request in enumerate(requests):
            tensors = [pb_utils.get_input_tensor_by_name(request, name) for name in IMAGE_INPUTS]
            problem = _problem(*(tensor.shape() for tensor in tensors))
            if request.is_cancelled():
                responses[index] = _failure(
                    "cancelled by the client", pb_utils.TritonError.CANCELLED
                )
            elif problem:
                responses[index] = _failure(problem, pb_utils.TritonError.INVALID_ARG)
            else:
                image1, image2 = map(np.from_dlpack, tensors)
                accepted.append((index, image1, image2))
        if accepted:
            self._run(accepted, responses)
        return responses

    def _run(self, accepted: list[tuple[int, Images, Images]], responses: list[Any]) -> None:
        try:
            flow = self.engine(
                _joined([image1 for _, image1, _ in accepted]),
                _joined([image2 for _, _, image2 in accepted]),
            )
        except (RuntimeError, MemoryError) as error:  # such as no memory for images of that size
            for index, _, _ in accepted:
                responses[index] = _failure(
                    f"inference failed: {error}", pb_utils.TritonError.INTERNAL
                )
            return
        first = 0
        for index, image1, _ in accepted:
            part = flow[first : first + len(image1)]
            responses[index] = pb_utils.InferenceResponse(
                [pb_utils.Tensor.from_dlpack(FLOW_OUTPUT, Lent(part))]
            )
            first += len(image1)


def _joined(images: list[Images]) -> Images:
    return images[0] if len(images) == 1 else np.concatenate(images)


def _problem(shape1: Sequence[int], shape2: Sequence[int]) -> str | None:
    if shape1 != shape2:
        return f"image1 and image2 differ in size: {_size(shape1)} and {_size(shape2)}"
    if min(shape1[1:3]) < MINIMUM_SIDE:
        return f"images of {_size(shape1)} are too small: {MINIMUM_SIDE}x{MINIMUM_SIDE} at least"
    return None if is_possible(shape1) else f"images of {_size(shape1)} are too large"


def _size(shape: Sequence[int]) -> str:
    return f"{shape[2]}x{shape[1]}"


def _failure(message: str, code: Any) -> Any:
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(message, code))

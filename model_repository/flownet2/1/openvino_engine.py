"""Runs an exported network on the CPU.

By OpenVINO, which ran the networks faster than ONNX Runtime did on every CPU that was measured
(``make bench`` repeats it). Where the CPU multiplies bfloat16 in hardware, the wide convolutions
run in bfloat16, which halves the time. All that carries flow stays float32, see
:func:`.bfloat16.cast_to_bfloat16`. Elsewhere everything is float32.
"""

import contextlib
import functools
import math
import os
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import onnx.inliner
import openvino

from flownet2.contract import GRID, IMAGE_INPUTS, adapted

from .bfloat16 import cast_to_bfloat16
from .resampling import remove_idle_resampling

Images = npt.NDArray[np.uint8]
Flow = npt.NDArray[np.float32]
Shape = tuple[int, ...]

USUAL_SHAPE: Shape = (1, *GRID, 3)  # what the gateway's default path asks for
# OpenVINO 2026.4.1 on a Xeon with AMX, bfloat16, images at most 64 wide and thousands high (black
# from 64x12288, with texture from 64x8192): flow of 1e28, or not finite, or another at each call.
# The deepest features are then one column wide. Float32 is right, as is bfloat16 from 128 wide, for
# wide images 64 high, and on an EPYC with AVX-512's bfloat16 at all of these sizes. Which
# convolution is the first to be wrong is not known: a report to OpenVINO needs that, and a CPU with
# AMX to find it.
BFLOAT16_WIDTH = 128

# A graph is planned for a shape that recurs among the last requests, as far as memory goes; graphs
# of shapes that do not appear among them are dropped for it.
RECENT, RECURRING = 32, 3
PLANNED_BYTES = 2**30
PIXEL_BYTES = 400  # of features; 170 in the thin networks


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
        self._model = _read(path, self.precision)
        self._planned = {USUAL_SHAPE: self._plan(USUAL_SHAPE)}
        self._planner = ThreadPoolExecutor(1)
        # Beside the first requests: to wait for it would make a restart longer by a third.
        self._any_shape = self._planner.submit(_compile, self._model)
        self._planning: tuple[Shape, Future[openvino.InferRequest]] | None = None
        self._recent: deque[Shape] = deque(maxlen=RECENT)

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
        if self.precision == "bf16" and adapted(shape[2]) < BFLOAT16_WIDTH:
            return self._for_narrow_images
        if self._planning and self._planning[1].done():
            planned, future = self._planning
            self._planned[planned] = (self._any_shape if future.exception() else future).result()
            self._planning = None
        self._recent.append(shape)
        if shape in self._planned:
            return self._planned[shape]
        if self._recent.count(shape) >= RECURRING and not self._planning and self._fits(shape):
            self._planning = shape, self._planner.submit(self._plan, shape)
        return self._any_shape.result()

    def _fits(self, shape: Shape) -> bool:
        """Whether a graph for a shape fits beside those in use; others are dropped for it."""
        size = self._path.stat().st_size
        memory = {
            one: size + PIXEL_BYTES * adapted(one[1]) * adapted(one[2])
            for one in (*self._planned, shape)
        }
        for unused in set(self._planned) - set(self._recent):
            if sum(memory.values()) > PLANNED_BYTES:
                del self._planned[unused], memory[unused]
        return sum(memory.values()) <= PLANNED_BYTES

    def _plan(self, shape: Shape) -> openvino.InferRequest:
        """A graph for one shape; it saves about a tenth of the time."""
        model = self._model.clone()
        model.reshape({name: list(shape) for name in IMAGE_INPUTS})
        remove_idle_resampling(model)
        return _compile(model)

    @functools.cached_property
    def _for_narrow_images(self) -> openvino.InferRequest:
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

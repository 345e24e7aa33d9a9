"""Runs an exported network on a GPU by ONNX Runtime, in half precision.

ONNX Runtime selects cuDNN's algorithms again whenever a shape or batch size changes
(microsoft/onnxruntime issue 23006). A shape that recurs therefore gets a session with fixed
dimensions. Everything that depends on them is folded into constants, inputs and outputs have fixed
addresses on the GPU, and a CUDA graph replays all kernels in one launch.
"""

import contextlib
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnxruntime

from flownet2.contract import BATCH_EDGE, FLOW_OUTPUT, IMAGE_INPUTS, MAX_BATCH_SIZE, adapted

from .engines import EngineError, Flow, Images, feature_bytes
from .planned import PlannedShapes, Shape

CUDA = "CUDAExecutionProvider"
OPERATORS = "libflownet2_onnxruntime.so"  # the compiled correlation, built by plugins/
DIMENSIONS = ("batch", "height", "width")  # opset of the exported graph

RECENT, RECURRING = 32, 3  # a shape is planned at its third request among the last 32
PLANNED_BYTES = 2**32
PIXEL_BYTES = 1000

Run = Callable[[Images, Images], Flow]


class OnnxRuntimeEngine:
    """A network, ready to run on a GPU (see :class:`.engines.Engine`)."""

    first_runs = RECURRING

    def __init__(self, folder: Path, gpu: int = 0, provider: str = CUDA) -> None:
        """Load an exported network.

        Args:
            folder: the model's version folder.
            gpu: the GPU's number.
            provider: execution provider of ONNX Runtime; one other than CUDA's runs on the CPU, for
                tests.

        Raises:
            EngineError: ONNX Runtime does not run on the GPU.
        """
        self._cuda = provider == CUDA
        if self._cuda:
            onnxruntime.preload_dlls()  # of the wheels that onnxruntime-gpu needs
        self.name = f"ONNX Runtime {onnxruntime.__version__}"
        self._kind, self._number = ("cuda", gpu) if self._cuda else ("cpu", 0)
        self.device = f"cuda:{gpu}" if self._cuda else "cpu"
        self._provider = provider
        half = folder / "model_fp16.onnx"
        self._path = half if half.is_file() else folder / "model.onnx"
        self._any_shape = self._session()
        self._metadata = self._any_shape.get_modelmeta().custom_metadata_map
        self.precision = self._metadata.get("precision", "fp32")
        self._pairs = int(self._metadata.get("batch", MAX_BATCH_SIZE))
        self._recent: deque[Shape] = deque(maxlen=RECENT)
        self._planned = PlannedShapes(self._plan, self._memory, PLANNED_BYTES)

    def __call__(self, image1: Images, image2: Images) -> Flow:
        """Compute the flow from ``image1`` to ``image2``, ``[N, H, W, 3]``.

        Pairs of up to 576x576 run in batches, larger ones fill the GPU one by one.
        """
        flow = np.empty((*image1.shape[:3], 2), np.float32)
        for part in batches(image1.shape, self._pairs):
            run = self._run_for(image1[part].shape)
            flow[part] = run(image1[part], image2[part])
        return flow

    def _run_for(self, shape: Shape) -> Run:
        self._recent.append(shape)
        if shape in self._planned or self._recent.count(shape) >= RECURRING:
            return self._planned[shape]
        return self._run_any_shape

    def _run_any_shape(self, image1: Images, image2: Images) -> Flow:
        with runtime_errors():
            images = dict(zip(IMAGE_INPUTS, (image1, image2), strict=True))
            flow: Flow = self._any_shape.run([FLOW_OUTPUT], images)[0]
        return flow

    def _memory(self, shape: Shape) -> int:
        """Return the bytes that a plan occupies on the GPU: its weights, and features."""
        batch, height, width = shape[:3]
        features = feature_bytes(self._metadata, adapted(height) * adapted(width), PIXEL_BYTES)
        return self._path.stat().st_size + int(batch * features)

    def _plan(self, shape: Shape) -> Run:
        """Return the fixed session of a shape, or the session for any shape if that fails."""
        try:
            with runtime_errors():
                return _Plan(self._session(shape), shape, self._kind, self._number)
        except RuntimeError as error:
            # To Triton's log.
            print(f"flownet2: no network compiled for the shape {shape}: {error}", flush=True)
            return self._run_any_shape

    def _session(self, shape: Shape | None = None) -> onnxruntime.InferenceSession:
        """Create a session, for one shape or for any."""
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        with contextlib.suppress(Exception):  # without it the op's function body runs
            options.register_custom_ops_library(OPERATORS)
        settings = {
            "device_id": self._number,
            "prefer_nhwc": 1,
            "arena_extend_strategy": "kSameAsRequested",
            # By default cuDNN times every algorithm for each shape, which takes seconds.
            "cudnn_conv_algo_search": "HEURISTIC",
        }
        if shape:
            for dimension, size in zip(DIMENSIONS, shape, strict=False):
                options.add_free_dimension_override_by_name(dimension, size)
            settings["enable_cuda_graph"] = 1
        if shape and self._cuda:
            options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
        session = onnxruntime.InferenceSession(
            self._path,
            options,
            providers=[self._provider],
            provider_options=[settings if self._cuda else {}],
            enable_fallback=0,
        )
        if session.get_providers()[0] != self._provider:
            raise EngineError(f"ONNX Runtime does not load its {self._provider}; its log says why")
        return session


class _Plan:
    """A session for one shape, with its inputs and output at one place on the device."""

    def __init__(
        self, session: onnxruntime.InferenceSession, shape: Shape, kind: str, number: int
    ) -> None:
        def allocate(shape: Shape, dtype: type) -> onnxruntime.OrtValue:
            return onnxruntime.OrtValue.ortvalue_from_shape_and_type(shape, dtype, kind, number)

        self._session = session
        self._images = [allocate(shape, np.uint8) for _ in IMAGE_INPUTS]
        self._flow = allocate((*shape[:3], 2), np.float32)
        self._binding = session.io_binding()
        for name, value in zip(IMAGE_INPUTS, self._images, strict=True):
            self._binding.bind_ortvalue_input(name, value)
        self._binding.bind_ortvalue_output(FLOW_OUTPUT, self._flow)

    def __call__(self, image1: Images, image2: Images) -> Flow:
        with runtime_errors():
            for value, image in zip(self._images, (image1, image2), strict=True):
                value.update_inplace(np.ascontiguousarray(image))
            self._session.run_with_iobinding(self._binding)
            flow: Flow = self._flow.numpy()
        return flow


@contextlib.contextmanager
def runtime_errors() -> Iterator[None]:
    """Raise ONNX Runtime's errors, which have no common base, as RuntimeError."""
    try:
        yield
    except Exception as error:
        raise RuntimeError(str(error)) from error


def batches(shape: Shape, largest: int = MAX_BATCH_SIZE) -> Iterator[slice]:
    """Cut a batch into parts that run at once: powers of two, so that few shapes recur."""
    batch, height, width = shape[:3]
    size = largest if max(height, width) <= BATCH_EDGE else 1
    start = 0
    while start < batch:
        while size > batch - start:
            size //= 2
        yield slice(start, start + size)
        start += size

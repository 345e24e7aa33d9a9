"""Runs an exported network on the CPU by OpenVINO.

OpenVINO ran the networks faster than ONNX Runtime on every CPU that was measured (``make bench``
repeats it). The graph is rewritten for the CPU, see :mod:`.passes`: if the CPU multiplies bfloat16
in hardware, the convolutions run in bfloat16, which halves the time.
"""

from pathlib import Path

import numpy as np
import openvino

from flownet2.contract import IMAGE_INPUTS, adapted

from .engines import Flow, Images, feature_bytes
from .machine import available_cores, available_memory, has_amx, has_bfloat16
from .passes import Graph
from .planned import PlannedShapes, Shape

# With OpenVINO 2026.4.1 in bfloat16 on a Xeon with AMX, the flow of images that are at most 64 wide
# and thousands high (from 64x8192) is not finite or differs from call to call: the deepest features
# are one column wide. Float32 is correct, and so is bfloat16 from 128 wide, for wide images 64
# high, and on an EPYC with AVX-512's bfloat16. The first convolution that is wrong is not known.
BFLOAT16_WIDTH = 128

PLANNED_SHARE = 0.25  # share of the memory
# Bytes of features for each pixel, measured at 512x512 to 1920x1088; 190 and 270 in thin networks.
PIXEL_BYTES = {"bf16": 500, "fp32": 720}
WEIGHTS = {"bf16": 0.5, "fp32": 1.0}  # bytes for each byte of the file


class OpenVinoEngine:
    """A network, ready to run on the CPU (see :class:`.engines.Engine`).

    Every shape runs on a model compiled for it: a model compiled for any shape is slower, and
    rounds differently, so the flow of a pair would depend on what was requested before.
    """

    device = "cpu"
    first_runs = 0

    def __init__(self, path: Path, precision: str) -> None:
        """Read an exported network.

        Args:
            path: the exporter's ``model.onnx``.
            precision: "bf16" or "fp32".
        """
        self.name = f"OpenVINO {openvino.get_version().split('-')[0]}"
        self.precision = precision
        self._path = path
        self._graph = Graph(path, precision == "bf16", has_amx())
        limit = int(PLANNED_SHARE * available_memory())
        self._planned = PlannedShapes(self._plan, self._memory, limit)

    def __call__(self, image1: Images, image2: Images) -> Flow:
        """Compute the flow from ``image1`` to ``image2``, ``[N, H, W, 3]``.

        The pairs of a batch run one after the other, because together they take more time and
        memory.
        """
        shape = (1, *image1.shape[1:])
        request = self._planned[shape]
        flow = np.empty((*image1.shape[:3], 2), np.float32)
        for pair, result in zip(zip(image1, image2, strict=True), flow, strict=True):
            images = dict(zip(IMAGE_INPUTS, (image[None] for image in pair), strict=True))
            request.set_output_tensor(openvino.Tensor(result[None], shared_memory=True))
            request.infer(images, share_inputs=True, share_outputs=True)
        return flow

    def _memory(self, shape: Shape) -> int:
        """Return the bytes that a plan occupies: its own copy of the weights, and features."""
        pixels = adapted(shape[1]) * adapted(shape[2])
        features = feature_bytes(self._graph.metadata, pixels, PIXEL_BYTES[self.precision])
        return int(WEIGHTS[self.precision] * self._path.stat().st_size + features)

    def _plan(self, shape: Shape) -> openvino.InferRequest:
        narrow = self.precision == "bf16" and adapted(shape[2]) < BFLOAT16_WIDTH
        graph = Graph(self._path, False, False) if narrow else self._graph
        return _compile(graph.for_shape(shape))


def precisions() -> list[str]:
    """Return the precisions that suit this CPU, by preference."""
    return ["bf16", "fp32"] if has_bfloat16() else ["fp32"]


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

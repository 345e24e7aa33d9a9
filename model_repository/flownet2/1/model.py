"""Model of Triton's Python backend: computes optical flow with the network beside it.

On a GPU instance ONNX Runtime runs ``model_fp16.onnx`` on CUDA, otherwise OpenVINO runs
``model.onnx`` on the CPU. An engine serves only if it reproduces the golden pair
(``golden.npz``); if it does not, the next one is tried.

The modules of this folder import nothing else of the project but ``flownet2/contract.py``, of which
the exporter puts a copy beside them. It copies all of them to models of other names.
"""

import contextlib
import ctypes
import gc
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# NVIDIA's container honours PYTHONPATH, the stub of the PyPI wheel runs isolated and does not.
sys.path[:0] = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))

import numpy as np  # noqa: E402

from flownet2.contract import (  # noqa: E402
    FLOW_OUTPUT,
    IMAGE_INPUTS,
    MINIMUM_SIDE,
    SIZE_MULTIPLE,
    adapted,
)

from .engines import Flow, Golden, Images, candidates, first_that_is_right  # noqa: E402
from .stub_guard import guard, is_possible  # noqa: E402

with contextlib.suppress(ModuleNotFoundError):  # exists only in Triton's stub
    import triton_python_backend_utils as pb_utils


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # parameters of glibc's mallopt


class Output:
    """Zero-copy DLPack wrapper of a result that works around the stub's NumPy 1 ABI.

    The stub is compiled against NumPy 1 and misreads arrays of NumPy 2, so they pass as DLPack. The
    stub renames a consumed capsule to a name that NumPy does not expect, and NumPy would print an
    error for every request. This class restores the name.
    """

    def __init__(self, array: Flow) -> None:
        """Wrap an array."""
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
    """The class that Triton's Python backend instantiates, once for each model instance."""

    def initialize(self, arguments: dict[str, str]) -> None:
        """Load the network into the first engine that reproduces the golden pair.

        The engine is written to Triton's log, and to its metrics as labels of
        ``flownet2_golden_difference_px``.
        """
        guard(pb_utils.Tensor)
        keep_freed_memory()
        name, version = arguments["model_name"], arguments["model_version"]
        folder = Path(arguments["model_repository"]) / version
        on_gpu = arguments["model_instance_kind"] == "GPU"
        gpu = int(arguments["model_instance_device_id"]) if on_gpu else None
        self._max_pixels = _max_pixels(arguments["model_config"])
        golden = Golden.read(folder / "golden.npz")
        self.engine, difference = first_that_is_right(
            candidates(folder, gpu, golden),
            golden,
            lambda line: pb_utils.Logger.log_warn(f"{name}: {line}"),
        )
        facts = {
            "engine": self.engine.name,
            "device": self.engine.device,
            "precision": self.engine.precision,
        }
        pb_utils.Logger.log_info(
            f"{name} runs on {', '.join(facts.values())}; "
            f"its flow of the golden pair differs by {difference:.4f} px"
        )
        self._metrics = pb_utils.MetricFamily(
            name="flownet2_golden_difference_px",
            description="Mean distance to the flow of the golden pair when the model was loaded",
            kind=pb_utils.MetricFamily.GAUGE,
        )
        labels = {"model": name, "version": version, **facts}
        self._metric = self._metrics.Metric(labels=labels)
        self._metric.set(difference)

    def finalize(self) -> None:
        """Free the metric and the engine, whose last inputs are in memory that the stub frees."""
        del self._metric, self._metrics, self.engine
        gc.collect()

    def execute(self, requests: list[Any]) -> list[Any]:
        """Run a batch that Triton formed as one batch of the engine.

        Triton batches only requests of one shape. A request whose images differ in size or are too
        small gets an error response; a cancelled request is not computed.
        """
        responses: list[Any] = [None] * len(requests)
        accepted: list[tuple[int, Images, Images]] = []
        for index, request in enumerate(requests):
            tensors = [pb_utils.get_input_tensor_by_name(request, name) for name in IMAGE_INPUTS]
            shape1, shape2 = (tensor.shape() for tensor in tensors)
            problem = _problem(shape1, shape2, self._max_pixels)
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
        except (RuntimeError, MemoryError) as error:  # usually no memory for this size
            for index, _, _ in accepted:
                responses[index] = _failure(
                    f"inference failed: {error}", pb_utils.TritonError.INTERNAL
                )
            return
        first = 0
        for index, image1, _ in accepted:
            part = flow[first : first + len(image1)]
            responses[index] = pb_utils.InferenceResponse(
                [pb_utils.Tensor.from_dlpack(FLOW_OUTPUT, Output(part))]
            )
            first += len(image1)


def keep_freed_memory() -> None:
    """Have the C library reuse freed memory of up to 128 MiB.

    By default it returns arrays of the size of a flow to the system and gets their pages again, one
    page fault each, for every request: 1.3 ms at 512x512.
    """
    libc = ctypes.CDLL(None)
    libc.mallopt(_M_MMAP_THRESHOLD, 2**25)  # the largest value that it accepts
    libc.mallopt(_M_TRIM_THRESHOLD, 2**27)


def _joined(images: list[Images]) -> Images:
    return images[0] if len(images) == 1 else np.concatenate(images)


def _max_pixels(configuration: str) -> int | None:
    """Read the largest number of pixels from the model's configuration, if it has one."""
    parameters = json.loads(configuration).get("parameters", {})
    return int(parameters["max_pixels"]["string_value"]) if "max_pixels" in parameters else None


def _problem(shape1: Sequence[int], shape2: Sequence[int], max_pixels: int | None) -> str | None:
    if shape1 != shape2:
        return f"image1 and image2 differ in size: {_size(shape1)} and {_size(shape2)}"
    if min(shape1[1:3]) < MINIMUM_SIDE:
        return f"images of {_size(shape1)} are too small: {MINIMUM_SIDE}x{MINIMUM_SIDE} at least"
    if not is_possible(shape1):
        return f"images of {_size(shape1)} are too large"
    pixels = adapted(shape1[1]) * adapted(shape1[2])
    if max_pixels and pixels > max_pixels:
        return (
            f"images of {_size(shape1)} are too large: with sides rounded up to multiples of "
            f"{SIZE_MULTIPLE} they have {pixels} pixels, and {max_pixels} is the most"
        )
    return None


def _size(shape: Sequence[int]) -> str:
    return f"{shape[2]}x{shape[1]}"


def _failure(message: str, code: Any) -> Any:
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(message, code))

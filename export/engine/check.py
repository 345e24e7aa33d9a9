"""Runs a plan on the golden pair before Triton gets it, by TensorRT's runtime and the CUDA driver.

Triton's image has no other Python package that allocates GPU memory.
"""

import contextlib
import ctypes
import importlib.util
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from export.engine.gpu import EngineError
from flownet2.contract import BATCH_EDGE, FLOW_OUTPUT, IMAGE_INPUTS, MAX_BATCH_SIZE

logger = logging.getLogger(__name__)


def check_plan(engine: Any, folder: Path) -> float:
    """Return the mean difference of a plan's flow from the golden pair's, in pixels.

    Args:
        engine: TensorRT's deserialised engine.
        folder: the model's version folder, with the golden pair and the limits that hold for every
            engine (`engines.py`).

    Raises:
        EngineError: the difference is above the limit for half precision, or the plan does not run.
    """
    try:
        engines = _load(folder / "engines.py")
    except (OSError, SyntaxError) as error:
        raise EngineError(f"the model's code cannot be read: {error}. Export it again") from None
    try:
        with _Plan.running(engine) as plan:
            difference: float = engines.Golden.read(folder / "golden.npz").difference(plan)
    except engines.EngineError as error:
        raise EngineError(f"the engine is not used: {error}") from None
    return difference


def _load(file: Path) -> Any:
    specification = importlib.util.spec_from_file_location(file.stem, file)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules[file.stem] = module  # for dataclasses
    specification.loader.exec_module(module)
    return module


class _Plan:
    """A plan, ready to run on one pair (see `Engine` in the model's engines.py)."""

    name, device, precision = "TensorRT", "cuda:0", "fp16"
    first_runs = 0

    def __init__(self, context: Any, driver: "_Driver") -> None:
        self._context = context
        self._driver = driver

    @classmethod
    @contextlib.contextmanager
    def running(cls, engine: Any) -> Iterator["_Plan"]:
        """Create the memory and the stream that the plan runs with, and free them at the end."""
        with _Driver() as driver:
            context = engine.create_execution_context()
            if context is None:
                raise EngineError("there is not enough GPU memory for the engine")
            # The profile for small images, such as the golden pair.
            if not context.set_optimization_profile_async(0, driver.stream.value):
                raise EngineError("TensorRT does not select the engine's first profile")
            yield cls(context, driver)
            driver.synchronize()

    def __call__(
        self, image1: npt.NDArray[np.uint8], image2: npt.NDArray[np.uint8]
    ) -> npt.NDArray[np.float32]:
        flow = np.empty((*image1.shape[:3], 2), np.float32)
        for name, image in zip(IMAGE_INPUTS, (image1, image2), strict=True):
            if not self._context.set_input_shape(name, image.shape):
                raise EngineError(f"TensorRT refuses {name} of shape {image.shape}")
            self._context.set_tensor_address(name, self._driver.copy_in(image))
        shape = tuple(self._context.get_tensor_shape(FLOW_OUTPUT))
        if shape != flow.shape:
            raise EngineError(f"TensorRT's flow has the shape {shape} instead of {flow.shape}")
        # Triton allocates this size for an output whose size is not known in advance.
        largest = MAX_BATCH_SIZE * BATCH_EDGE**2 * 2 * flow.itemsize
        if (bound := self._context.get_max_output_size(FLOW_OUTPUT)) > largest:
            logger.warning("TensorRT's bound of the flow's size is %d, not %d B", bound, largest)
        address = self._driver.allocate(flow.nbytes)
        self._context.set_tensor_address(FLOW_OUTPUT, address)
        if not self._context.execute_async_v3(self._driver.stream.value):
            raise EngineError("TensorRT does not run the engine")
        self._driver.synchronize()
        self._driver.copy_out(address, flow)
        return flow


class _Driver:
    """The CUDA driver's functions that a plan needs; memory is freed when the block ends."""

    def __enter__(self) -> "_Driver":
        self._cuda = ctypes.CDLL("libcuda.so.1")
        self._allocated: list[ctypes.c_uint64] = []
        self._device, context, self.stream = ctypes.c_int(), ctypes.c_void_p(), ctypes.c_void_p()
        self._call("cuInit", 0)
        self._call("cuDeviceGet", ctypes.byref(self._device), 0)
        # TensorRT uses this context too.
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(context), self._device)
        self._call("cuCtxSetCurrent", context)
        self._call("cuStreamCreate", ctypes.byref(self.stream), 0)
        return self

    def __exit__(self, *_: object) -> None:
        for address in self._allocated:
            self._cuda.cuMemFree_v2(address)
        self._cuda.cuStreamDestroy_v2(self.stream)
        self._cuda.cuDevicePrimaryCtxRelease_v2(self._device)

    def allocate(self, size: int) -> int:
        """Return the address of new memory of `size` bytes."""
        address = ctypes.c_uint64()
        self._call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(size))
        self._allocated.append(address)
        return address.value

    def copy_in(self, array: npt.NDArray[Any]) -> int:
        """Return the address of a copy of the array on the GPU."""
        address = self.allocate(array.nbytes)
        source = np.ascontiguousarray(array)
        pointer = ctypes.c_void_p(source.ctypes.data)
        self._call(
            "cuMemcpyHtoD_v2", ctypes.c_uint64(address), pointer, ctypes.c_size_t(array.nbytes)
        )
        return address

    def copy_out(self, address: int, array: npt.NDArray[Any]) -> None:
        """Fill the array from the GPU's memory."""
        pointer = ctypes.c_void_p(array.ctypes.data)
        self._call(
            "cuMemcpyDtoH_v2", pointer, ctypes.c_uint64(address), ctypes.c_size_t(array.nbytes)
        )

    def synchronize(self) -> None:
        """Wait until the stream has finished."""
        self._call("cuStreamSynchronize", self.stream)

    def _call(self, function: str, *arguments: Any) -> None:
        if status := getattr(self._cuda, function)(*arguments):
            raise EngineError(f"the CUDA driver's {function} fails with error {status}")

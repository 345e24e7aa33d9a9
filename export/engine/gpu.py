"""The GPU, as the CUDA driver describes it; no CUDA library is needed to ask."""

import ctypes
import os
from dataclasses import dataclass

MINIMUM_CAPABILITY = (7, 5)  # Turing: of TensorRT 11, of CUDA 13, and of the plugins' kernels

_CAPABILITY_MAJOR, _CAPABILITY_MINOR = 75, 76  # CUdevice_attribute


class EngineError(Exception):
    """No engine here: one line that says why and what to change."""


@dataclass(frozen=True)
class Gpu:
    """The GPU that CUDA programs use unless told otherwise."""

    name: str
    capability: tuple[int, int]


def find_gpu() -> Gpu:
    """The GPU that can serve here.

    Raises:
        EngineError: there is none, it is too old, or its driver is.
    """
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise EngineError(
            f"no GPU: no CUDA driver ({error}); in Docker, give the container one (--gpus all)"
        ) from None
    name = ctypes.create_string_buffer(256)
    device, driver, major, minor = (ctypes.c_int() for _ in range(4))
    status = (
        cuda.cuDriverGetVersion(ctypes.byref(driver))
        or cuda.cuInit(0)
        or cuda.cuDeviceGet(ctypes.byref(device), 0)
        or cuda.cuDeviceGetName(name, len(name), device)
        or cuda.cuDeviceGetAttribute(ctypes.byref(major), _CAPABILITY_MAJOR, device)
        or cuda.cuDeviceGetAttribute(ctypes.byref(minor), _CAPABILITY_MINOR, device)
    )
    if status:
        raise EngineError(f"no GPU: the CUDA driver answers with error {status}")
    gpu = Gpu(name.value.decode(), (major.value, minor.value))
    if gpu.capability < MINIMUM_CAPABILITY:
        raise EngineError(
            f"{gpu.name} has compute capability {_dotted(gpu.capability)}, "
            f"and {_dotted(MINIMUM_CAPABILITY)} is needed"
        )
    # NVIDIA's images name the CUDA that they hold; a driver runs all of its major version.
    needed = os.environ.get("CUDA_VERSION", "0").split(".")[0]
    if (supported := driver.value // 1000) < int(needed):
        raise EngineError(
            f"the driver of {gpu.name} is for CUDA {supported}, and CUDA {needed} is needed: "
            "install a newer driver"
        )
    return gpu


def _dotted(version: tuple[int, int]) -> str:
    return "{}.{}".format(*version)

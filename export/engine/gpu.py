"""Finding the GPU that can serve on this machine, with nothing but the CUDA driver."""

import ctypes
import os
from dataclasses import dataclass

from flownet2.errors import Error

MINIMUM_CAPABILITY = (7, 5)  # Turing, the minimum of TensorRT 11, CUDA 13 and the plugins' kernels

_CAPABILITY_MAJOR, _CAPABILITY_MINOR = 75, 76  # CUdevice_attribute


class EngineError(Error):
    """Raised when this machine has no suitable GPU, or no engine can be built for it."""


class NoDriver(EngineError):
    """Raised on a machine without a CUDA driver."""


@dataclass(frozen=True)
class Gpu:
    """The first GPU, which CUDA programs use by default."""

    name: str
    capability: tuple[int, int]


def find_gpu(cuda: int | None = None) -> Gpu:
    """Return the GPU that can serve on this machine.

    Args:
        cuda: major version of CUDA that the driver must support. Default: the container's, which
            NVIDIA's images set as CUDA_VERSION.

    Raises:
        EngineError: there is no GPU, or the GPU or its driver is too old.
    """
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise NoDriver(
            f"no GPU: no CUDA driver ({error}); in Docker, give the container one (--gpus all)"
        ) from None
    name = ctypes.create_string_buffer(256)
    device, version, major, minor = (ctypes.c_int() for _ in range(4))
    status = (
        driver.cuDriverGetVersion(ctypes.byref(version))
        or driver.cuInit(0)
        or driver.cuDeviceGet(ctypes.byref(device), 0)
        or driver.cuDeviceGetName(name, len(name), device)
        or driver.cuDeviceGetAttribute(ctypes.byref(major), _CAPABILITY_MAJOR, device)
        or driver.cuDeviceGetAttribute(ctypes.byref(minor), _CAPABILITY_MINOR, device)
    )
    if status:
        raise EngineError(f"no GPU: the CUDA driver answers with error {status}")
    gpu = Gpu(name.value.decode(), (major.value, minor.value))
    if gpu.capability < MINIMUM_CAPABILITY:
        raise EngineError(
            f"{gpu.name} has compute capability {_dotted(gpu.capability)}, "
            f"and {_dotted(MINIMUM_CAPABILITY)} is needed"
        )
    needed = int(os.environ.get("CUDA_VERSION", "0").split(".")[0]) if cuda is None else cuda
    if (supported := version.value // 1000) < needed:
        raise EngineError(
            f"the driver of {gpu.name} supports CUDA {supported}, and CUDA {needed} is needed: "
            "install a newer driver"
        )
    return gpu


def _dotted(version: tuple[int, int]) -> str:
    return "{}.{}".format(*version)

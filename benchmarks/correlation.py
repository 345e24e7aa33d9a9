"""Errors and times of the CUDA kernels on a GPU.

    python -m benchmarks.correlation

Needs a GPU, nvcc and PyTorch with CUDA. Compiles the kernels for this GPU, compares them with brute
force over `plugins/correlation_cases.py`, and times the half-precision kernel at FlowNet2's two
sizes. The table also has two limits, measured on the same GPU: the time to move inputs and output
once at the speed of a large copy, and the time of the arithmetic at the speed of cuBLAS.

Exits with 0 if all results are correct, 1 if not, 2 if something is missing.
"""

import ctypes
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.report import table
from flownet2.errors import Error
from plugins.correlation_cases import CASES, TIMED_CASES, Case, brute_force, tolerance

PLUGINS = Path(__file__).parents[1] / "plugins"
SOURCES = ("correlation.cu", "correlation.cpp", "correlation_c.cpp")


class Missing(Error):
    """Raised when this machine lacks hardware or software that a benchmark needs."""


class Kernel:
    """The kernels of plugins/, on PyTorch's tensors and current stream."""

    def __init__(self, folder: Path) -> None:
        """Compile the kernels for this machine's GPU, into a library in `folder`.

        Raises:
            Missing: there is no GPU, or no nvcc.
        """
        if not torch.cuda.is_available():
            raise Missing("no GPU that PyTorch can use")
        if shutil.which("nvcc") is None:
            raise Missing("no nvcc on the PATH")
        library = folder / "correlation.so"
        options = ("-std=c++17", "-O3", "--shared", "-Xcompiler", "-fPIC", "-arch=native")
        sources = (PLUGINS / name for name in SOURCES)
        subprocess.run(  # noqa: S603 (our own sources, no shell)
            ["nvcc", *options, "-I", PLUGINS, *sources, "-o", library],  # noqa: S607
            check=True,
        )
        self._function = ctypes.CDLL(str(library)).flownet2_correlation_cuda
        self._function.restype = ctypes.c_char_p

    def __call__(self, case: Case, a: Tensor, b: Tensor) -> Tensor:
        """Queue the correlation of two dense NCHW tensors with the attributes of `case`.

        Raises:
            RuntimeError: the library rejects the call; the message is the library's.
        """
        out = torch.full(case.output_shape, float("nan"), dtype=a.dtype, device=a.device)
        message = self._function(
            (ctypes.c_int32 * 5)(*case.attributes.values()),
            (ctypes.c_int64 * 4)(*a.shape),
            ctypes.c_int(a.dtype == torch.float16),
            *(ctypes.c_void_p(tensor.data_ptr()) for tensor in (a, b, out)),
            ctypes.c_void_p(torch.cuda.current_stream().cuda_stream),
        )
        if message is not None:
            raise RuntimeError(message.decode())
        return out


def inputs(case: Case, dtype: type[np.floating[Any]]) -> tuple[Tensor, Tensor]:
    """Return the case's feature maps on the GPU."""
    a, b = case.inputs(dtype)
    return torch.from_numpy(a).cuda(), torch.from_numpy(b).cuda()


def check(kernel: Kernel, case: Case, dtype: type[np.floating[Any]]) -> bool:
    """Print the largest error of one case, and return True if all are within the tolerance."""
    a, b = inputs(case, dtype)
    got = kernel(case, a, b).cpu().numpy().astype(np.float64)
    expected = brute_force(case, a.cpu().numpy(), b.cpu().numpy())
    errors, limits = np.abs(got - expected), tolerance(dtype)
    correct = bool((errors <= limits["atol"] + limits["rtol"] * np.abs(expected)).all())
    print(
        f"{case.name:32} {dtype.__name__}  {errors.max():9.2e}  {'correct' if correct else 'WRONG'}"
    )
    return correct


def milliseconds(call: Callable[[], object]) -> float:
    """Return the median time of a call on the GPU, with cold caches."""
    from triton.testing import do_bench  # noqa: PLC0415 - comes with PyTorch's CUDA builds alone

    return float(do_bench(call, return_mode="median"))


def operations(case: Case) -> int:
    """Count multiplications and additions whose factors both lie inside the feature maps."""
    _, channels, height, width = case.shape
    steps = case.max_displacement // case.stride2
    offsets = [abs(step * case.stride2) for step in range(-steps, steps + 1)]
    rows, columns = (sum(max(size - offset, 0) for offset in offsets) for size in (height, width))
    return 2 * case.shape[0] * channels * rows * columns


def print_times(kernel: Kernel) -> None:
    """Print a table of the half-precision kernel's times at FlowNet2's sizes, and its limits."""
    large = torch.empty(2**28, dtype=torch.float32, device="cuda")
    bytes_per_ms = 2 * large.nbytes / milliseconds(large.clone)
    a, b = torch.randn(2, 4096, 4096, device="cuda", dtype=torch.float16)
    operations_per_ms = 2 * 4096**3 / milliseconds(lambda: a @ b)
    print(f"\ncopy {bytes_per_ms / 1e6:.0f} GB/s, cuBLAS {operations_per_ms / 1e9:.1f} TFLOP/s\n")
    rows = []
    for case in TIMED_CASES:
        a, b = inputs(case, np.float16)
        out = kernel(case, a, b)
        times = (
            milliseconds(lambda: kernel(case, a, b)),  # noqa: B023 (called at once)
            (a.nbytes + b.nbytes + out.nbytes) / bytes_per_ms,
            operations(case) / operations_per_ms,
        )
        rows.append([case.name, *(f"{time:.4f}" for time in times)])
    print(table(["float16", "ms", "memory limit", "arithmetic limit"], rows))


def main() -> int:
    """Run everything and return the exit status."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            kernel = Kernel(Path(folder))
        except Missing as missing:
            print(f"benchmarks.correlation: {missing}", file=sys.stderr)
            return 2
    print(f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}\n")
    results = [
        check(kernel, case, dtype)
        for case in (*CASES, *TIMED_CASES)
        for dtype in (np.float32, np.float16)
    ]
    print_times(kernel)
    print(f"\n{results.count(True)} of {len(results)} correct")
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())

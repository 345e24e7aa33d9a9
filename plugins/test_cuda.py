"""The CUDA kernels on a GPU: errors, times, and their share of what the GPU can do.

    python plugins/test_cuda.py

Needs a GPU, nvcc, PyTorch with CUDA and NumPy. Compiles the kernels for the GPU that is there,
holds them against brute force over `tests/support/correlation_cases.py`, and times FlowNet2's
two sizes against the larger of two limits, both measured here: moving inputs and output once at the
speed of a large copy, and the arithmetic at the speed of cuBLAS. If the package
`spatial-correlation-sampler` is installed, its kernel runs beside.

Exits with 0 if all results are right, 1 if not, 2 if something is missing to run at all.
"""

from __future__ import annotations

import ctypes
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

PLUGINS = Path(__file__).parent
sys.path.insert(0, str(PLUGINS.parent))

from tests.support.correlation_cases import CASES, TIMED_CASES, Case, brute_force, tolerance  # noqa: E402

try:
    import torch
except ImportError:
    torch = None  # type: ignore[assignment]
try:
    from spatial_correlation_sampler import spatial_correlation_sample
except ImportError:
    spatial_correlation_sample = None

SOURCES = tuple(
    PLUGINS / name for name in ("correlation.cu", "correlation.cpp", "correlation_c.cpp")
)
DTYPES = (np.float32, np.float16)
LAUNCHES = 20  # in one CUDA graph, so that launching costs no time of its own
REPEATS = 30


class Missing(Exception):
    """The machine lacks something that the script cannot do without."""


def compile_kernels(folder: Path, architecture: str) -> Path:
    """A library with `flownet2_correlation_cuda`, for sm_`architecture`."""
    if shutil.which("nvcc") is None:
        raise Missing("no nvcc on the PATH")
    library = folder / "correlation.so"
    subprocess.run(  # noqa: S603 (our own sources, no shell)
        [
            *("nvcc", "-std=c++17", "-O3", "--shared", "-Xcompiler", "-fPIC", "-I", str(PLUGINS)),
            *("-gencode", f"arch=compute_{architecture},code=sm_{architecture}"),
            *(*map(str, SOURCES), "-o", str(library)),
        ],
        check=True,
    )
    return library


class Kernel:
    """The compiled kernels, on PyTorch's tensors and current stream."""

    def __init__(self, library: Path) -> None:
        self.function = ctypes.CDLL(str(library)).flownet2_correlation_cuda
        self.function.restype = ctypes.c_char_p

    def __call__(self, case: Case, a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> None:
        """Queues out = Correlation(a, b); raises RuntimeError with the library's message."""
        message = self.function(
            (ctypes.c_int32 * 5)(*case.attributes.values()),
            (ctypes.c_int64 * 4)(*case.shape),
            ctypes.c_int(a.dtype == torch.float16),
            *(ctypes.c_void_p(tensor.data_ptr()) for tensor in (a, b, out)),
            ctypes.c_void_p(torch.cuda.current_stream().cuda_stream),
        )
        if message is not None:
            raise RuntimeError(message.decode())


def tensors(case: Case, dtype: type[np.floating]) -> tuple[torch.Tensor, ...]:
    """a, b and an output full of NaN, on the GPU."""
    a, b = (torch.from_numpy(array).cuda() for array in case.inputs(dtype))
    return a, b, torch.full(case.output_shape, float("nan"), dtype=a.dtype, device="cuda")


def check(kernel: Kernel, case: Case, dtype: type[np.floating]) -> bool:
    """Prints the largest error of one case; whether all of it is within the tolerance."""
    a, b, out = tensors(case, dtype)
    kernel(case, a, b, out)
    torch.cuda.synchronize()
    got = out.cpu().numpy().astype(np.float64)
    expected = brute_force(case, a.cpu().numpy(), b.cpu().numpy())
    right = bool(np.allclose(got, expected, **tolerance(dtype)))
    error = np.abs(got - expected).max()
    print(f"{case.name:32} {dtype.__name__}  {error:9.2e}  {'right' if right else 'WRONG'}")
    return right


def milliseconds(call: Callable[[], object]) -> float:
    """Median time of one call, from replays of a graph of LAUNCHES calls."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        call()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(LAUNCHES):
            call()
    return median_of_repeats(graph.replay)


def milliseconds_uncaptured(call: Callable[[], object]) -> float:
    """Median time of one call that launches on the default stream, which no graph captures.

    Where the GPU is faster than the launches, their time is in it.
    """

    def launch() -> None:
        for _ in range(LAUNCHES):
            call()

    call()
    return median_of_repeats(launch)


def median_of_repeats(launch: Callable[[], object]) -> float:
    """Median milliseconds of one of the LAUNCHES calls that `launch` queues on an idle GPU."""
    times = []
    for _ in range(REPEATS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        launch()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / LAUNCHES)
    return statistics.median(times)


def bytes_per_ms() -> float:
    """What a copy far larger than any cache moves, reading and writing."""
    source = torch.empty(2**28, dtype=torch.float32, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / milliseconds(lambda: target.copy_(source))


def operations_per_ms(dtype: torch.dtype) -> float:
    """What cuBLAS reaches: FMA units in float32 (no TF32), tensor cores in float16."""
    torch.backends.cuda.matmul.allow_tf32 = False
    size = 4096
    a, b = torch.randn(2, size, size, device="cuda", dtype=dtype)
    out = torch.empty_like(a)
    return 2 * size**3 / milliseconds(lambda: torch.mm(a, b, out=out))


def operations(case: Case) -> int:
    """Multiplications and additions whose factors both lie inside the image."""
    _, channels, height, width = case.shape
    steps = case.max_displacement // case.stride2
    offsets = [abs(step * case.stride2) for step in range(-steps, steps + 1)]
    rows, columns = (sum(max(size - offset, 0) for offset in offsets) for size in (height, width))
    return 2 * case.shape[0] * channels * rows * columns


def sampler(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """spatial-correlation-sampler's kernel with FlowNet's attributes.

    Sums, not means, [N, 21, 21, H, W]. It launches on the default stream, whatever the current one.
    """
    return spatial_correlation_sample(
        a, b, kernel_size=1, patch_size=21, stride=1, padding=0, dilation_patch=2
    )


def sampler_agrees(a: torch.Tensor, b: torch.Tensor, ours: torch.Tensor) -> bool:
    """Whether the other kernel computes the same, so that its time is that of the same work.

    Loosely: its sums of float16 are float16 too.
    """
    theirs = sampler(a, b).flatten(1, 2).float() / a.shape[1]
    return torch.allclose(theirs, ours.float(), rtol=1e-2, atol=2e-3)


def time_table(kernel: Kernel) -> None:
    """Prints times and limits of FlowNet2's sizes."""
    bandwidth = bytes_per_ms()
    rates = {dtype: operations_per_ms(dtype) for dtype in (torch.float32, torch.float16)}
    print(
        f"\ncopy {bandwidth / 1e6:.0f} GB/s; cuBLAS float32 {rates[torch.float32] / 1e9:.1f}, "
        f"float16 {rates[torch.float16] / 1e9:.1f} TFLOP/s"
    )
    if spatial_correlation_sample is None:
        print("spatial-correlation-sampler is not installed: not compared")
    print(
        "\nfeatures      type     time ms  memory limit  arithmetic limit  time/limit (wanted <= 2)"
        "  other ms  ratio (wanted >= 3)"
    )
    for case in TIMED_CASES:
        for dtype in DTYPES:
            a, b, out = tensors(case, dtype)
            time = milliseconds(lambda: kernel(case, a, b, out))  # noqa: B023 (called at once)
            memory = (a.nbytes + b.nbytes + out.nbytes) / bandwidth
            arithmetic = operations(case) / rates[a.dtype]
            row = (
                f"{case.name:13} {dtype.__name__}  {time:7.4f}  {memory:7.4f} {memory / time:4.0%}"
                f"  {arithmetic:10.4f} {arithmetic / time:5.0%}"
                f"  {time / max(memory, arithmetic):24.2f}"
            )
            if spatial_correlation_sample is not None:
                theirs = milliseconds_uncaptured(lambda: sampler(a, b))  # noqa: B023 (at once)
                row += f"  {theirs:8.4f}  {theirs / time:6.1f}"
                if not sampler_agrees(a, b, out):
                    row += "  (its result differs from ours)"
            print(row)


def main() -> int:
    """Runs everything; returns the exit code."""
    try:
        if torch is None:
            raise Missing("no PyTorch here: install torch with CUDA")
        gpu = torch.cuda.is_available()
        major, minor = torch.cuda.get_device_capability() if gpu else (7, 5)
        with tempfile.TemporaryDirectory() as folder:
            library = compile_kernels(Path(folder), f"{major}{minor}")
            if not gpu:
                raise Missing("no GPU that PyTorch can use; the kernels compile, no more was tried")
            kernel = Kernel(library)
            print(f"{torch.cuda.get_device_name()}, sm_{major}{minor}, CUDA {torch.version.cuda}\n")
            results = [
                check(kernel, case, dtype) for case in (*CASES, *TIMED_CASES) for dtype in DTYPES
            ]
            time_table(kernel)
    except Missing as missing:
        print(f"test_cuda.py: {missing}")
        return 2
    print(f"\n{results.count(True)} of {len(results)} right")
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())

"""FlowNet2 on a GPU: eager PyTorch as the ports run it, and what is served.

    python -m benchmarks.gpu [--network FlowNet2] [--op-library FILE] [--triton]

Needs a GPU, nvcc and PyTorch with CUDA. Other projects' correlation kernels, ONNX Runtime with CUDA
and TensorRT join in where they are installed; the loader must find the TensorRT plugin. With
--triton, the Triton that HOST and TRITON_GRPC_PORT name is measured too, from 1, 8 and 32 clients.
Weights are random, as the speed does not depend on them. Exits with 2 where something is missing.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.correlation import Kernel, Missing, other_kernels
from benchmarks.perf_analyzer import ROUNDS as REQUESTS
from benchmarks.perf_analyzer import PerfAnalyzer, Unavailable
from benchmarks.report import table
from export.engine.build import build_engine, import_tensorrt
from export.engine.gpu import EngineError
from export.graph import export_onnx
from export.networks import NETWORKS, FlowNet2
from export.networks.operators import correlation
from export.repository import HALF_MODEL, write_model
from flownet2.contract import FLOW_OUTPUT, GRID, IMAGE_INPUTS, MODEL_NAME
from launch.triton import Address
from plugins.correlation_cases import Case

WARM_UP, ROUNDS = 5, 30
CLIENTS = (1, 8, 32)

Estimate = Callable[[], object]


def main() -> int:
    """Print the tables; 2 where there is no GPU, PyTorch for it, or nvcc."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--network", default="FlowNet2", choices=sorted(NETWORKS))
    parser.add_argument("--op-library", type=Path, help="the op of plugins/ for ONNX Runtime")
    parser.add_argument("--triton", action="store_true", help="measure a running Triton, too")
    options = parser.parse_args()
    try:
        with tempfile.TemporaryDirectory() as folder:
            kernel = Kernel(Path(folder))
            gpu = torch.cuda.get_device_name()
            print(f"{gpu}, CUDA {torch.version.cuda}, PyTorch {torch.__version__}\n")
            print(network_table(options.network, kernel, Path(folder), options.op_library))
        if options.triton:
            print(PerfAnalyzer().measure(Address.from_environment(), CLIENTS, REQUESTS))
    except (Missing, Unavailable) as missing:
        print(f"benchmarks.gpu: {missing}", file=sys.stderr)
        return 2
    return 0


def network_table(name: str, kernel: Kernel, folder: Path, op_library: Path | None) -> str:
    """Median milliseconds, their share of the first row's, and GPU memory beside the weights."""
    rows, first = [], None
    for way, estimate in ways(name, kernel, folder, op_library):
        milliseconds, megabytes = measure(estimate)
        first = first or milliseconds
        rows.append((way, f"{milliseconds:.1f}", f"{milliseconds / first:.2f}", f"{megabytes:.0f}"))
    return table((f"{name}, {GRID[1]}x{GRID[0]}, one pair", "p50 ms", "of eager", "MB"), rows)


def ways(
    name: str, kernel: Kernel, folder: Path, op_library: Path | None
) -> Iterator[tuple[str, Estimate]]:
    """Every way to run the network that this machine has, one after the other."""
    torch.backends.cudnn.benchmark = True
    torch.manual_seed(0)
    model = FlowNet2(NETWORKS[name]).eval()
    write_model(folder, MODEL_NAME, export_onnx(model), {})
    model.cuda()
    image1 = torch.randint(0, 256, (1, *GRID, 3), dtype=torch.uint8, device="cuda")
    image2 = image1.roll(3, 2)

    def eager() -> Tensor:
        with torch.inference_mode():
            flow: Tensor = model(image1, image2)
        return flow

    yield "eager fp32, correlation in standard operators", eager
    for other, other_kernel in other_kernels().items():
        compute_correlation(other_kernel)
        yield f"eager fp32, {other}", eager
    compute_correlation(correlation_with(kernel))
    model.half()
    yield "eager fp16, our kernel", eager
    model.cpu()
    if op_library:
        yield "ONNX Runtime fp16", onnx_runtime(folder, image1, image2, op_library)
    try:
        yield "TensorRT fp16", tensorrt(folder, image1, image2)
    except EngineError as error:
        print(f"no TensorRT: {error}", file=sys.stderr)


def compute_correlation(kernel: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Have PyTorch compute FlowNetC's correlation on the GPU by a kernel."""
    correlation.register_kernel("cuda", lambda a, b, *attributes: kernel(a, b))


def correlation_with(kernel: Callable[[Case, Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    """FlowNetC's correlation by the compiled kernel."""

    def run(a: Tensor, b: Tensor) -> Tensor:
        n, c, height, width = a.shape
        return kernel(Case("FlowNetC", (n, c, height, width)), a.contiguous(), b.contiguous())

    return run


def onnx_runtime(folder: Path, image1: Tensor, image2: Tensor, op_library: Path) -> Estimate:
    """The exported network on ONNX Runtime's CUDA provider.

    Raises:
        Missing: ONNX Runtime, or its CUDA provider, is not installed.
    """
    try:
        import onnxruntime  # noqa: PLC0415 - optional
    except ImportError as error:
        raise Missing(f"--op-library needs onnxruntime-gpu: {error}") from error
    provider = "CUDAExecutionProvider"
    if provider not in onnxruntime.get_available_providers():
        raise Missing("this ONNX Runtime has no CUDA: install onnxruntime-gpu")
    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(str(op_library))
    session = onnxruntime.InferenceSession(
        folder / MODEL_NAME / "1" / HALF_MODEL, options, providers=[provider]
    )
    images = dict(zip(IMAGE_INPUTS, (image1.cpu().numpy(), image2.cpu().numpy()), strict=True))
    return lambda: session.run(None, images)


def tensorrt(folder: Path, image1: Tensor, image2: Tensor) -> Estimate:
    """The plan that Triton would load, without Triton.

    Raises:
        EngineError: it cannot be built here.
    """
    plan = build_engine(folder, MODEL_NAME)
    trt = import_tensorrt()
    runtime = trt.Runtime(trt.Logger(trt.Logger.ERROR))
    context = runtime.deserialize_cuda_engine(plan.read_bytes()).create_execution_context()
    stream = torch.cuda.current_stream().cuda_stream
    context.set_optimization_profile_async(0, stream)
    flow = torch.empty((1, *GRID, 2), device="cuda")
    for name, image in zip(IMAGE_INPUTS, (image1, image2), strict=True):
        context.set_input_shape(name, tuple(image.shape))
        context.set_tensor_address(name, image.data_ptr())
    context.set_tensor_address(FLOW_OUTPUT, flow.data_ptr())
    return lambda: (runtime, flow, context.execute_async_v3(stream))  # it keeps all three


def measure(estimate: Estimate) -> tuple[float, float]:
    """Median milliseconds of a call, and megabytes of the GPU that the calls take and keep."""
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    seconds = []
    for turn in range(WARM_UP + ROUNDS):
        start = time.perf_counter()
        estimate()
        torch.cuda.synchronize()
        if turn >= WARM_UP:
            seconds.append(time.perf_counter() - start)
    held = free - torch.cuda.mem_get_info()[0]
    return statistics.median(seconds) * 1e3, held / 1e6


if __name__ == "__main__":
    sys.exit(main())

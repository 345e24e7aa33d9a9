"""Times of FlowNet2 on a GPU: eager PyTorch, and the engines that serve it.

    python -m benchmarks.gpu [--network FlowNet2] [--triton]

Needs a GPU, nvcc and PyTorch with CUDA. ONNX Runtime with CUDA and TensorRT are measured if they
are installed; the loader must find the TensorRT plugin. With --triton, the Triton that HOST and
TRITON_GRPC_PORT name is measured too, from 1, 8 and 32 clients. Weights are random, as the speed
does not depend on them. Exits with status 2 if a requirement is missing.
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

from benchmarks.correlation import Kernel, Missing
from benchmarks.perf_analyzer import ROUNDS as REQUESTS
from benchmarks.perf_analyzer import PerfAnalyzer
from benchmarks.report import table
from export.engine.build import build_engine, import_tensorrt
from export.engine.gpu import EngineError
from export.graph import export_onnx
from export.networks import NETWORKS, FlowNet2
from export.networks.operators import correlation
from export.repository import write_model
from flownet2.contract import FLOW_OUTPUT, GRID, IMAGE_INPUTS, MODEL_NAME
from flownet2.errors import Error
from launch.triton import Address
from plugins.correlation_cases import Case

WARM_UP, ROUNDS = 5, 30
CLIENTS = (1, 8, 32)

Estimate = Callable[[], object]


def main() -> int:
    """Print the tables; return 2 without a GPU, PyTorch for it, or nvcc."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--network", default="FlowNet2", choices=sorted(NETWORKS))
    parser.add_argument("--triton", action="store_true", help="also measure a running Triton")
    options = parser.parse_args()
    try:
        with tempfile.TemporaryDirectory() as folder:
            kernel = Kernel(Path(folder))
            gpu = torch.cuda.get_device_name()
            print(f"{gpu}, CUDA {torch.version.cuda}, PyTorch {torch.__version__}\n")
            print(network_table(options.network, kernel, Path(folder)))
        if options.triton:
            print(PerfAnalyzer().measure(Address.from_environment(), CLIENTS, REQUESTS))
    except Error as error:
        print(f"benchmarks.gpu: {error}", file=sys.stderr)
        return 2
    return 0


def network_table(name: str, kernel: Kernel, folder: Path) -> str:
    """Return a table of median milliseconds, relative to the first row, and GPU memory."""
    rows, first = [], None
    for way, estimate in ways(name, kernel, folder):
        milliseconds, megabytes = measure(estimate)
        first = first or milliseconds
        rows.append((way, f"{milliseconds:.1f}", f"{milliseconds / first:.2f}", f"{megabytes:.0f}"))
    return table((f"{name}, {GRID[1]}x{GRID[0]}, one pair", "p50 ms", "of eager", "MB"), rows)


def ways(name: str, kernel: Kernel, folder: Path) -> Iterator[tuple[str, Estimate]]:
    """Yield the label and the inference function of each configuration that can run here."""
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
    compute_correlation(correlation_with(kernel))
    model.half()
    yield "eager fp16, our kernel", eager
    model.cpu()
    for way, create in {
        "ONNX Runtime fp16, with copies from and to the CPU": onnx_runtime,
        "TensorRT fp16": tensorrt,
    }.items():
        try:
            estimate = create(folder, image1, image2)
        except Error as error:
            print(f"no {way}: {error}", file=sys.stderr)
        else:
            yield way, estimate


def compute_correlation(kernel: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Have PyTorch compute FlowNetC's correlation on the GPU with this kernel."""
    correlation.register_kernel("cuda", lambda a, b, *attributes: kernel(a, b))


def correlation_with(kernel: Callable[[Case, Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    """Return FlowNetC's correlation, computed by the compiled kernel."""

    def run(a: Tensor, b: Tensor) -> Tensor:
        n, c, height, width = a.shape
        return kernel(Case("FlowNetC", (n, c, height, width)), a.contiguous(), b.contiguous())

    return run


def onnx_runtime(folder: Path, image1: Tensor, image2: Tensor) -> Estimate:
    """Return the engine that Triton's Python backend runs.

    Raises:
        Missing: ONNX Runtime does not run on the GPU.
    """
    try:
        from export.served.engines import EngineError as NotServed  # noqa: PLC0415 - optional
        from export.served.onnxruntime_engine import OnnxRuntimeEngine  # noqa: PLC0415
    except ImportError as error:
        raise Missing(f"onnxruntime-gpu is not installed: {error}") from error
    try:
        engine = OnnxRuntimeEngine(folder / MODEL_NAME / "1")
    except (NotServed, RuntimeError) as error:
        raise Missing(str(error)) from error
    images = image1.cpu().numpy(), image2.cpu().numpy()
    return lambda: engine(*images)


def tensorrt(folder: Path, image1: Tensor, image2: Tensor) -> Estimate:
    """Return a function that runs the plan that Triton would load.

    Raises:
        EngineError: it cannot be built or run here.
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

    def run() -> object:
        if not context.execute_async_v3(stream):
            raise EngineError("TensorRT does not run the engine")
        return runtime, flow, image1, image2  # kept alive with this function

    return run


def measure(estimate: Estimate) -> tuple[float, float]:
    """Return the median milliseconds of a call, and the megabytes of GPU memory that it keeps."""
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

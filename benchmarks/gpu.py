"""FlowNet2 on a GPU: eager PyTorch as the ports run it, our correlation kernel, half precision.

    python -m benchmarks.gpu [--network FlowNet2] [--op-library libflownet2_onnxruntime.so]

Needs a GPU, nvcc, PyTorch with CUDA and NumPy; ONNX Runtime with CUDA and the package
`spatial-correlation-sampler` join in where they are installed. Weights are random, as the speed
does not depend on them. Exits with 2 where something is missing to run at all.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest.mock import patch

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from benchmarks.correlation import Kernel, Missing, other_kernels
from export.networks import NETWORKS, FlowNet2
from plugins.correlation_cases import Case

SIZE = 512
WARM_UP, ROUNDS = 5, 30

Estimate = Callable[[], object]


def main() -> int:
    """Print one table; 2 where there is no GPU, PyTorch for it, or nvcc."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--network", default="FlowNet2", choices=sorted(NETWORKS))
    parser.add_argument("--op-library", type=Path, help="the op of plugins/ for ONNX Runtime")
    options = parser.parse_args()
    try:
        if not torch.cuda.is_available():
            raise Missing("no GPU that PyTorch can use")
        print_table(options.network, options.op_library)
    except Missing as missing:
        print(f"benchmarks.gpu: {missing}", file=sys.stderr)
        return 2
    return 0


def print_table(name: str, op_library: Path | None) -> None:
    """Median milliseconds, their share of the first row's, and GPU memory beside the weights."""
    gpu = torch.cuda.get_device_name()
    print(f"{gpu}, CUDA {torch.version.cuda}, PyTorch {torch.__version__}\n")
    print(f"| {name}, {SIZE}x{SIZE}, one pair | p50 ms | of eager | MB |")
    print("| --- | ---: | ---: | ---: |")
    first = None
    with tempfile.TemporaryDirectory() as folder:
        for way, estimate in ways(name, Path(folder), op_library):
            milliseconds, megabytes = measure(estimate)
            first = first or milliseconds
            print(f"| {way} | {milliseconds:.1f} | {milliseconds / first:.2f} | {megabytes:.0f} |")


def ways(name: str, folder: Path, op_library: Path | None) -> Iterator[tuple[str, Estimate]]:
    """Every way to run the network that this machine has, one after the other."""
    torch.backends.cudnn.benchmark = True
    torch.manual_seed(0)
    model = FlowNet2(NETWORKS[name]).eval().cuda()
    image1 = torch.randint(0, 256, (1, SIZE, SIZE, 3), dtype=torch.uint8, device="cuda")
    image2 = image1.roll(3, 2)

    def eager() -> Tensor:
        with torch.inference_mode():
            flow: Tensor = model(image1, image2)
        return flow

    yield "eager fp32, correlation in standard operators", eager
    for other, correlation in other_kernels().items():
        with patch("export.networks.blocks.correlation", correlation):
            yield f"eager fp32, {other}", eager
    with patch("export.networks.blocks.correlation", correlation_with(Kernel(folder))):
        model.half()
        yield "eager fp16, our kernel", eager
    if op_library:
        model.float().cpu()
        for half in (False, True):
            run = onnx_runtime(model, half, folder, op_library)
            images = {"image1": image1.cpu().numpy(), "image2": image2.cpu().numpy()}
            yield f"ONNX Runtime {'fp16' if half else 'fp32'}, our kernel", lambda: run(images)  # noqa: B023


def correlation_with(kernel: Kernel) -> Callable[[Tensor, Tensor], Tensor]:
    """FlowNetC's correlation by the compiled kernel."""

    def correlation(a: Tensor, b: Tensor) -> Tensor:
        n, c, height, width = a.shape
        return kernel(Case("FlowNetC", (n, c, height, width)), a.contiguous(), b.contiguous())

    return correlation


def onnx_runtime(
    model: FlowNet2, half: bool, folder: Path, op_library: Path
) -> Callable[[dict[str, npt.NDArray[np.uint8]]], object]:
    """The exported network on ONNX Runtime's CUDA provider.

    Raises:
        Missing: ONNX Runtime, or its CUDA provider, is not installed.
    """
    try:
        import onnx  # noqa: PLC0415 - optional, as is the next
        import onnxruntime  # noqa: PLC0415

        from export.graph import export_onnx  # noqa: PLC0415
        from export.half import to_half  # noqa: PLC0415
    except ImportError as error:
        raise Missing(f"--op-library needs the `gpu` extra: {error}") from error
    provider = "CUDAExecutionProvider"
    if provider not in onnxruntime.get_available_providers():
        raise Missing("this ONNX Runtime has no CUDA: install onnxruntime-gpu")
    proto = export_onnx(model)
    onnx.save(to_half(proto) if half else proto, folder / "model.onnx")
    session_options = onnxruntime.SessionOptions()
    session_options.register_custom_ops_library(str(op_library))
    session = onnxruntime.InferenceSession(
        folder / "model.onnx", session_options, providers=[provider]
    )
    return lambda images: session.run(None, images)


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

"""Times of a network at 512x512: eager PyTorch, the engines that can serve it, and Triton.

They are timed in rounds with one call of each, so that other load affects all of them equally.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnxruntime
import torch
from tritonclient import grpc

from benchmarks.perf_analyzer import SIZE
from benchmarks.report import milliseconds, table
from export.graph import export_onnx
from export.networks import NETWORKS, FlowNet2
from export.repository import write_model
from export.served.machine import available_cores, has_bfloat16
from export.served.openvino_engine import OpenVinoEngine
from export.shipped import WEIGHTS, write_shipped
from export.weights import load_weights
from flownet2.contract import FLOW_OUTPUT, IMAGE_INPUTS, IMAGE_TYPE, MODEL_NAME
from launch import wheel

Images = npt.NDArray[np.uint8]
Estimate = Callable[[Images, Images], npt.NDArray[np.float32]]


def compare_shipped(rounds: int) -> str:
    """Time the shipped network; return a Markdown table."""
    with tempfile.TemporaryDirectory() as folder:
        name = write_shipped(Path(folder))
        model, _ = load_weights(NETWORKS[name], WEIGHTS)
        return _compare(name, model, Path(folder), rounds)


def compare_random(name: str, rounds: int) -> str:
    """Time a network with random weights (the speed is the same); return a Markdown table."""
    model = random_network(name)
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder), MODEL_NAME, export_onnx(model), {"network": name})
        return _compare(name, model, Path(folder), rounds)


def _compare(name: str, model: FlowNet2, repository: Path, rounds: int) -> str:
    """Time every way to run the model of a repository; return a Markdown table."""
    torch.set_num_threads(available_cores())
    random = np.random.default_rng(0)
    image1 = random.integers(0, 256, (1, SIZE, SIZE, 3), np.uint8)
    image2 = np.roll(image1, 3, axis=2)
    file = repository / MODEL_NAME / "1" / "model.onnx"
    with (
        wheel.serve(repository) as server,
        grpc.InferenceServerClient(server.address.grpc) as client,
    ):
        eager = "PyTorch eager, fp32"
        ways: dict[str, Estimate] = {
            eager: lambda a, b: run_eager(model, a, b),
            "ONNX Runtime, fp32": onnx_runtime(file),
            "our engine (OpenVINO), fp32": OpenVinoEngine(file, "fp32"),
        }
        if has_bfloat16():
            ways["our engine (OpenVINO), bf16"] = OpenVinoEngine(file, "bf16")
        ways["through Triton, gRPC"] = lambda a, b: infer(client, a, b)
        medians = time_in_turn(ways, image1, image2, rounds)
    return table(
        (f"{name}, {SIZE}x{SIZE}, one pair", "p50 ms", "of eager"),
        [
            (label, milliseconds(median), f"{median / medians[eager]:.3f}")
            for label, median in medians.items()
        ],
    )


def time_in_turn(
    ways: dict[str, Estimate], image1: Images, image2: Images, rounds: int
) -> dict[str, float]:
    """Time the functions in turn, and return the median seconds per call of each."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds + 1):
        for name, estimate in ways.items():
            start = time.perf_counter()
            estimate(image1, image2)
            if turn:  # the first call plans and allocates
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def random_network(name: str) -> FlowNet2:
    """Return a network with random weights that keep features and flow in their usual range."""
    torch.manual_seed(0)
    model = FlowNet2(NETWORKS[name]).eval()
    for layer in model.modules():
        if isinstance(layer, torch.nn.Conv2d | torch.nn.ConvTranspose2d):
            torch.nn.init.kaiming_normal_(layer.weight, a=0.1)
    return model


def run_eager(model: FlowNet2, image1: Images, image2: Images) -> npt.NDArray[np.float32]:
    """Run a network in eager PyTorch."""
    with torch.inference_mode():
        flow: npt.NDArray[np.float32] = model(
            torch.from_numpy(image1), torch.from_numpy(image2)
        ).numpy()
    return flow


def onnx_runtime(file: Path) -> Estimate:
    """Load a network into ONNX Runtime, which inlines the correlation's function body."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = available_cores()
    # Threads that spin after a call would slow down the next function of the round.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])

    def estimate(image1: Images, image2: Images) -> npt.NDArray[np.float32]:
        flow: npt.NDArray[np.float32] = session.run(
            None, dict(zip(IMAGE_INPUTS, (image1, image2), strict=True))
        )[0]
        return flow

    return estimate


def infer(
    client: grpc.InferenceServerClient, image1: Images, image2: Images
) -> npt.NDArray[np.float32]:
    """Request the flow from Triton's model ``flownet2``."""
    inputs = []
    for name, image in zip(IMAGE_INPUTS, (image1, image2), strict=True):
        inputs.append(grpc.InferInput(name, list(image.shape), IMAGE_TYPE))
        inputs[-1].set_data_from_numpy(image)
    flow: npt.NDArray[np.float32] = client.infer(MODEL_NAME, inputs).as_numpy(FLOW_OUTPUT)
    return flow

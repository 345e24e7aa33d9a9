"""The biggest network at 512x512: PyTorch, the engines that could serve it, and Triton.

Weights are random, as the speed does not depend on them. All are timed in turn, one call of each
in a round, so that whatever else the machine does hits all alike.
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
from flownet2.contract import FLOW_OUTPUT, IMAGE_INPUTS, IMAGE_TYPE, MODEL_NAME
from launch import wheel

NETWORK = "FlowNet2"
ROUNDS = 5

Images = npt.NDArray[np.uint8]
Estimate = Callable[[Images, Images], npt.NDArray[np.float32]]


def compare() -> str:
    """Time every way to run the network; a Markdown table."""
    torch.set_num_threads(available_cores())
    model = random_network(NETWORK)
    random = np.random.default_rng(0)
    image1 = random.integers(0, 256, (1, SIZE, SIZE, 3), np.uint8)
    image2 = np.roll(image1, 3, axis=2)
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder), "flownet2", export_onnx(model), {"network": NETWORK})
        file = Path(folder) / "flownet2" / "1" / "model.onnx"
        with (
            wheel.serve(Path(folder)) as server,
            grpc.InferenceServerClient(server.address.grpc) as client,
        ):
            eager = "PyTorch eager, fp32"
            ways: dict[str, Estimate] = {
                eager: lambda a, b: run_eager(model, a, b),
                "ONNX Runtime, fp32": onnx_runtime(file),
                "OpenVINO, fp32": OpenVinoEngine(file, "fp32"),
            }
            if has_bfloat16():
                ways["OpenVINO, wide convolutions bf16"] = OpenVinoEngine(file, "bf16")
            ways["**through Triton**, gRPC"] = lambda a, b: infer(client, a, b)
            medians = time_in_turn(ways, image1, image2, ROUNDS)
    return table(
        (f"{NETWORK}, {SIZE}x{SIZE}, one pair", "p50 ms", "of eager"),
        [
            (name, milliseconds(median), f"{median / medians[eager]:.2f}")
            for name, median in medians.items()
        ],
    )


def time_in_turn(
    ways: dict[str, Estimate], image1: Images, image2: Images, rounds: int
) -> dict[str, float]:
    """Median seconds of a call of each, over rounds in which each is called once."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds + 1):
        for name, estimate in ways.items():
            start = time.perf_counter()
            estimate(image1, image2)
            if turn:  # the first call plans and allocates
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def random_network(name: str) -> FlowNet2:
    """A network with weights of a scale that keeps features and flow in their usual range."""
    torch.manual_seed(0)
    model = FlowNet2(NETWORKS[name]).eval()
    for layer in model.modules():
        if isinstance(layer, torch.nn.Conv2d | torch.nn.ConvTranspose2d):
            torch.nn.init.kaiming_normal_(layer.weight, a=0.1)
    return model


def run_eager(model: FlowNet2, image1: Images, image2: Images) -> npt.NDArray[np.float32]:
    """The network in PyTorch, as most people would run it."""
    with torch.inference_mode():
        flow: npt.NDArray[np.float32] = model(
            torch.from_numpy(image1), torch.from_numpy(image2)
        ).numpy()
    return flow


def onnx_runtime(file: Path) -> Estimate:
    """The network in ONNX Runtime, which inlines the correlation's function body."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = available_cores()
    # Threads that spin after a call would take time from the next way in the round.
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
    """A request to Triton's model ``flownet2``."""
    inputs = []
    for name, image in zip(IMAGE_INPUTS, (image1, image2), strict=True):
        inputs.append(grpc.InferInput(name, list(image.shape), IMAGE_TYPE))
        inputs[-1].set_data_from_numpy(image)
    flow: npt.NDArray[np.float32] = client.infer(MODEL_NAME, inputs).as_numpy(FLOW_OUTPUT)
    return flow

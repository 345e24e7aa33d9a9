"""Communication with Triton: gRPC channel options, health check, failures, engine reports."""

import re
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from flownet2.contract import GRID, IMAGE_INPUTS, IMAGE_TYPE, SIZE_MULTIPLE

_MESSAGE_LIMIT = 2**31 - 1
CHANNEL = [
    ("grpc.max_send_message_length", _MESSAGE_LIMIT),
    ("grpc.max_receive_message_length", _MESSAGE_LIMIT),
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.max_pings_without_data", 0),
    # Reconnect within two seconds of a restart: gRPC's own backoff grows to two minutes.
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.min_reconnect_backoff_ms", 1_000),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    ("grpc.use_local_subchannel_pool", 1),
    # Ignore `http_proxy`: Triton is on the local network.
    ("grpc.enable_http_proxy", 0),
]

INFER = "/inference.GRPCInferenceService/ModelInfer"
_LENGTH_DELIMITED = 2
"""Protobuf's wire type of bytes."""

Failure = Literal[
    "deadline-exceeded",
    "queue-full",
    "image-too-large",
    "unknown-model",
    "unavailable",
    "model-failed",
]


def health_check(gpu: bool) -> dict[str, NDArray[np.uint8]]:
    """Return the inputs of a health-check inference: two black images, by input name.

    Args:
        gpu: True if the model runs on a GPU. Its images are then 512x512: an engine for that size
            exists anyway, and another size would need another engine. On a CPU they are 64x64, the
            smallest size that the networks compute.

    Returns:
        Arrays of shape [1, height, width, 3].
    """
    height, width = GRID if gpu else (SIZE_MULTIPLE, SIZE_MULTIPLE)
    return {name: np.zeros((1, height, width, 3), np.uint8) for name in IMAGE_INPUTS}


def infer_request(
    model: str,
    images1: NDArray[np.uint8],
    images2: NDArray[np.uint8],
    timeout: float,
    request_id: str = "",
) -> bytes:
    """Encode a `ModelInferRequest`, for the method `INFER` of a gRPC channel.

    Protobuf's own encoding copies the images twice more, which takes 2 ms at 512x512.

    Args:
        model: name of the model.
        images1: first images, uint8 [N, height, width, 3].
        images2: second images, of the same shape.
        timeout: limit of the time in Triton's queue, in seconds.
        request_id: ID that Triton logs.
    """
    from tritonclient.grpc.service_pb2 import ModelInferRequest  # noqa: PLC0415  an extra

    request = ModelInferRequest(
        model_name=model,
        id=request_id,
        inputs=[
            {"name": name, "datatype": IMAGE_TYPE, "shape": images1.shape} for name in IMAGE_INPUTS
        ],
    )
    request.parameters["timeout"].int64_param = max(1, int(timeout * 1e6))
    parts: list[bytes | memoryview] = [request.SerializeToString()]
    tag = _varint(ModelInferRequest.RAW_INPUT_CONTENTS_FIELD_NUMBER << 3 | _LENGTH_DELIMITED)
    for images in (images1, images2):
        parts += [tag, _varint(images.nbytes), np.ascontiguousarray(images).data]
    return b"".join(parts)


def _varint(number: int) -> bytes:
    content = bytearray()
    while number > 0x7F:
        content.append(number & 0x7F | 0x80)
        number >>= 7
    content.append(number)
    return bytes(content)


def failure(code: str, message: str) -> Failure:
    """Classify a failed inference by its gRPC status and message.

    Triton returns UNAVAILABLE when its queue is full and when a request waited too long, and gRPC
    returns it when there is no connection; only the message tells them apart.
    """
    unavailable = code == "UNAVAILABLE"
    if code == "DEADLINE_EXCEEDED" or (unavailable and "Request timeout expired" in message):
        return "deadline-exceeded"
    if unavailable and "Exceeds maximum queue size" in message:
        return "queue-full"
    # TensorRT's backend, for a size outside of the ranges that the engine was built for.
    if "Optimization Profile" in message or "specifies invalid shape" in message:
        return "image-too-large"
    connection_lost = code == "CANCELLED" or (code == "UNKNOWN" and "Stream removed" in message)
    # The Python backend's process has crashed, or /dev/shm is full.
    backend_lost = "Stub process" in message or "shared memory pool" in message
    if unavailable or connection_lost or backend_lost:
        return "unavailable"
    return "unknown-model" if code == "NOT_FOUND" else "model-failed"


@dataclass(frozen=True)
class EngineReport:
    """Engine that runs a model, as the model reports it in Triton's metrics.

    Attributes:
        model: name of the model.
        engine: such as "openvino" or "onnxruntime".
        device: such as "CPU".
        precision: such as "float32".
        golden_difference_px: mean distance to the flow of the golden pair when it was loaded.
    """

    model: str
    engine: str
    device: str
    precision: str
    golden_difference_px: float


def engine_reports(metrics: str) -> list[EngineReport]:
    """Return the reports in Triton's metrics (Prometheus text format)."""
    reports = []
    for line, value in re.findall(r"^flownet2_golden_difference_px{(.*)} (\S+)$", metrics, re.M):
        labels = dict(re.findall(r'(\w+)="([^"]*)"', line))
        facts = {name: labels.get(name, "") for name in ("model", "engine", "device", "precision")}
        reports.append(EngineReport(**facts, golden_difference_px=float(value)))
    return reports

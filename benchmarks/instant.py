"""`python -m benchmarks.instant PORT`: a Triton whose model takes no time.

For measuring the gateway alone: it answers the gateway's gRPC requests with the same random flow
for every pair.
"""

import functools
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import numpy as np
from tritonclient.grpc import service_pb2 as messages
from tritonclient.grpc.service_pb2_grpc import (
    GRPCInferenceServiceServicer,
    add_GRPCInferenceServiceServicer_to_server,
)

from flownet2 import contract

UNLIMITED = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]


class Instant(GRPCInferenceServiceServicer):  # type: ignore[misc]
    """gRPC service of a Triton with the model `flownet2`, which takes no time."""

    def ModelStatistics(self, _request: Any, _context: Any) -> Any:
        statistics = messages.ModelStatisticsResponse()
        statistics.model_stats.add(name=contract.MODEL_NAME, version="1")
        return statistics

    def ServerMetadata(self, _request: Any, _context: Any) -> Any:
        return messages.ServerMetadataResponse(name="instant", version="instant")

    def ModelMetadata(self, request: Any, _context: Any) -> Any:
        metadata = messages.ModelMetadataResponse(name=request.name, versions=["1"])
        for name in contract.IMAGE_INPUTS:
            metadata.inputs.add(name=name, datatype=contract.IMAGE_TYPE, shape=[-1, -1, -1, 3])
        metadata.outputs.add(
            name=contract.FLOW_OUTPUT, datatype=contract.FLOW_TYPE, shape=[-1, -1, -1, 2]
        )
        return metadata

    def ModelConfig(self, _request: Any, _context: Any) -> Any:
        return messages.ModelConfigResponse()

    def ModelInfer(self, request: Any, _context: Any) -> Any:
        shape = (*request.inputs[0].shape[:3], 2)
        response = messages.ModelInferResponse(raw_output_contents=[random_flow(shape)])
        response.outputs.add(name=contract.FLOW_OUTPUT, datatype=contract.FLOW_TYPE, shape=shape)
        return response


@functools.cache
def random_flow(shape: tuple[int, ...]) -> bytes:
    """Return a random flow as bytes; its values have as many digits as a real flow's."""
    return np.random.default_rng(0).normal(0, 10, shape).astype(np.float32).tobytes()


if __name__ == "__main__":
    server = grpc.server(ThreadPoolExecutor(8), options=UNLIMITED)
    add_GRPCInferenceServiceServicer_to_server(Instant(), server)
    server.add_insecure_port(f"127.0.0.1:{sys.argv[1]}")
    server.start()
    server.wait_for_termination()

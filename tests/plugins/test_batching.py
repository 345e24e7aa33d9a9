"""The batches that a real Triton forms with the library for TensorRT's backend.

Triton takes the library from a model's version folder too, for any backend, so the Python backend
stands in for TensorRT's; it is Triton's core that forms batches.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import numpy as np
import pytest
import tritonclient.grpc.aio as client

from flownet2.contract import BATCH_EDGE
from launch import wheel
from tests.support.gateway_stack import write_model
from tests.support.plugins_build import library


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    repository = tmp_path_factory.mktemp("repository")
    for name in ("with", "without"):
        write_model(repository, name)
        config = repository / name / "config.pbtxt"
        # Longer than eight requests take to arrive, so that one batch could hold them all.
        delay = "dynamic_batching { max_queue_delay_microseconds: 500000"
        config.write_text(config.read_text().replace("dynamic_batching {", delay))
    strategy = repository / "with" / "1" / "batchstrategy.so"
    strategy.symlink_to(library("libflownet2_batching.so"))
    with wheel.serve(repository) as server:
        yield server.address.grpc


def executions(address: str, model: str, height: int, width: int) -> int:
    """Return the number of batches in which eight simultaneous requests of one size run."""

    async def infer() -> int:
        async with client.InferenceServerClient(address) as server:
            images = np.zeros((1, height, width, 3), np.uint8)
            inputs = [
                client.InferInput(n, list(images.shape), "UINT8") for n in ("image1", "image2")
            ]
            for tensor in inputs:
                tensor.set_data_from_numpy(images)

            async def counts() -> tuple[int, int]:
                statistics = await server.get_inference_statistics(model)
                (found,) = statistics.model_stats
                return found.inference_count, found.execution_count

            inferences, batches = await counts()
            responses = await asyncio.gather(*(server.infer(model, inputs) for _ in range(8)))
            for response in responses:
                assert response.as_numpy("flow").shape == (1, height, width, 2)
            while (after := await counts())[0] < inferences + 8:  # Triton counts after it answers
                await asyncio.sleep(0.02)
            return after[1] - batches

    return asyncio.run(infer())


def test_small_images_share_batches(address: str) -> None:
    assert executions(address, "with", 512, 512) < 8
    assert executions(address, "with", BATCH_EDGE, BATCH_EDGE) < 8


@pytest.mark.parametrize("size", [(BATCH_EDGE + 1, 16), (16, BATCH_EDGE + 1), (720, 1280)])
def test_large_images_are_computed_one_by_one(address: str, size: tuple[int, int]) -> None:
    assert executions(address, "with", *size) == 8
    assert executions(address, "without", *size) < 8, "Triton alone batches them"

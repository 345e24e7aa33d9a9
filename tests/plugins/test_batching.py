"""Which requests a real Triton puts into one batch with the library for TensorRT's backend.

Triton takes the library from a model's version folder too, for any backend, so the Python backend
stands in for TensorRT's; it is Triton's core that forms batches.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tritonclient.grpc.aio as client

from export import tensorrt
from launch import triton
from tests.support.gateway_stack import write_model
from tests.support.plugins_build import PLUGINS, needs, run

EDGE = tensorrt.SMALLEST_BATCH_EDGE


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    needs("c++")
    file = tmp_path_factory.mktemp("batching") / "batchstrategy.so"
    run(
        *("c++", "-std=gnu++17", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"),
        *(PLUGINS / "triton_batching.cpp", "-o", file),
    )
    return file


@pytest.fixture(scope="module")
def address(library: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    repository = tmp_path_factory.mktemp("repository")
    for name in ("with", "without"):
        write_model(repository, name, delay_s=0.3)
        config = repository / name / "config.pbtxt"
        delay = "dynamic_batching { max_queue_delay_microseconds: 1000"  # as the configurations'
        config.write_text(config.read_text().replace("dynamic_batching {", delay))
    (repository / "with" / "1" / "batchstrategy.so").symlink_to(library)
    with triton.serve(repository) as server:
        yield server.address.grpc


def executions(address: str, model: str, height: int, width: int) -> int:
    """In how many batches eight simultaneous requests of one size were computed, one going ahead.

    The first keeps the model busy while the others queue up.
    """

    async def ask() -> int:
        async with client.InferenceServerClient(address) as server:
            images = np.zeros((1, height, width, 3), np.uint8)
            inputs = [
                client.InferInput(n, list(images.shape), "UINT8") for n in ("image1", "image2")
            ]
            for tensor in inputs:
                tensor.set_data_from_numpy(images)

            async def count() -> int:
                statistics = await server.get_inference_statistics(model)
                return int(statistics.model_stats[0].execution_count)

            before = await count()
            first = asyncio.create_task(server.infer(model, inputs))
            await asyncio.sleep(0.1)
            answers = await asyncio.gather(*(server.infer(model, inputs) for _ in range(7)))
            for answer in (*answers, await first):
                assert answer.as_numpy("flow").shape == (1, height, width, 2)
            return await count() - before

    return asyncio.run(ask())


def test_small_images_share_batches(address: str) -> None:
    assert executions(address, "with", 512, 512) < 8
    assert executions(address, "with", EDGE, EDGE) < 8


@pytest.mark.parametrize("size", [(EDGE + 1, 16), (16, EDGE + 1), (720, 1280)])
def test_large_images_are_computed_one_by_one(address: str, size: tuple[int, int]) -> None:
    assert executions(address, "with", *size) == 8
    assert executions(address, "without", *size) < 8, "Triton alone batches them"

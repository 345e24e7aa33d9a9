"""A set of procedural textures for all tests, and PyTorch on a single thread."""

from collections.abc import Iterator

import pytest
import torch

from training.textures import Textures


@pytest.fixture(scope="package")
def textures() -> Iterator[Textures]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield Textures()
    torch.set_num_threads(threads)

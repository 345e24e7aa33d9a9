"""A set of procedural textures for all tests, and PyTorch on a single thread."""

from collections.abc import Iterator

import pytest
import torch

from training.textures import Textures
from training.train import keep_memory


@pytest.fixture(scope="package")
def textures() -> Iterator[Textures]:
    keep_memory()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield Textures()
    torch.set_num_threads(threads)

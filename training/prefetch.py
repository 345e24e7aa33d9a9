"""Prefetching of textures in worker processes.

A GPU renders a scene much faster than a CPU core decodes and resizes its pictures.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import count
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from training.generator import Mixture, compose
from training.textures import TextureSource

Draw = tuple[Any, Tensor]  # textures, and the state of the random generator after them


class Recorder:
    """Textures that record their draws."""

    def __init__(self, textures: TextureSource) -> None:
        self.textures = textures
        self.draws: list[Draw] = []

    def tiles(self, count: int, random: torch.Generator) -> Tensor:
        tiles = self.textures.tiles(count, random)
        self.draws.append((tiles, random.get_state()))
        return tiles

    def outlines(self, count: int, size: int, random: torch.Generator) -> tuple[Tensor, Tensor]:
        outlines = self.textures.outlines(count, size, random)
        self.draws.append((outlines, random.get_state()))
        return outlines


class Replay:
    """Textures that replay the draws of a :class:`Recorder` in the same order."""

    def __init__(self, draws: list[Draw]) -> None:
        self.draws = iter(draws)

    def tiles(self, count: int, random: torch.Generator) -> Tensor:
        tiles, state = next(self.draws)
        random.set_state(state)
        return tiles  # type: ignore[no-any-return]

    def outlines(self, count: int, size: int, random: torch.Generator) -> tuple[Tensor, Tensor]:
        (outlines, colourless), state = next(self.draws)
        random.set_state(state)
        return outlines, colourless


class _Draws(Dataset[list[Draw]]):
    """Draws of the batches of a pool, by their index."""

    def __init__(
        self,
        textures: TextureSource,
        seed: int,
        scenes: int,
        size: tuple[int, int],
        mixture: Mixture,
    ) -> None:
        self.textures, self.seed, self.scenes = textures, seed, scenes
        self.size, self.mixture = size, mixture

    def __getitem__(self, index: int) -> list[Draw]:
        recorder = Recorder(self.textures)
        driving = self.mixture.kind(index)[1]
        # Tensors on the device "meta" have shapes but no pixels.
        compose(
            self.seed + index, self.scenes, *self.size, recorder, driving=driving, device="meta"
        )
        return recorder.draws


def draw_ahead(
    textures: TextureSource,
    seed: int,
    first: int,
    scenes: int,
    size: tuple[int, int],
    mixture: Mixture,
) -> Iterator[Replay]:
    """Draw the textures of batches `first`, `first + 1`, … of a pool ahead of their rendering.

    Batch i is `render(seed + i, scenes, *size, …)` of the mixture's kind i.
    """
    loader = DataLoader(
        _Draws(textures, seed, scenes, size, mixture),
        batch_size=None,
        sampler=count(first),
        num_workers=max(1, len(os.sched_getaffinity(0)) - 2),
        # Other libraries' threads in this process do not survive a fork.
        multiprocessing_context="spawn",
        pin_memory=torch.cuda.is_available(),
    )
    return map(Replay, loader)

"""Training crops from datasets with ground truth, augmented and loaded in worker processes.

Every dataset that `flownet2 evaluate` reads can be mixed into the training. The geometric
augmentation is FlowNet's (Dosovitskiy et al., ICCV 2015, section 4.3), which FlowNet 2.0 uses
too: translation, rotation and scaling of the pair, and a smaller transformation of the second
frame alone.
"""

from __future__ import annotations

import math
import os
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from flownet2.datasets import Sample, samples
from training.pairs import Pair, read_sample
from training.pool import Crop

ROTATION = math.radians(17)
SCALE = (0.9, 2.0)
RELATIVE_ROTATION, RELATIVE_SCALE, RELATIVE_SHIFT = math.radians(2), 0.03, 4.0
ATTEMPTS = 50  # to place a transformed crop inside the image
HELD_OUT_PAIRS = 32  # at most, from each dataset


@dataclass(frozen=True)
class Source:
    """Pairs of one dataset for training, pairs held out for validation, and its share of crops."""

    name: str
    training: list[Sample]
    held_out: list[Sample]
    share: float


def read_sources(arguments: Sequence[tuple[str, str]], holdout: float) -> list[Source]:
    """Find the pairs of datasets.

    Args:
        arguments: name and `DIR` or `DIR:SHARE` of each dataset. Datasets without a share divide
            the remaining share equally. Whatever share then remains is rendered by the generator.
        holdout: share of the sequences of each dataset that is held out for validation; at least
            one sequence if there are two.

    Raises:
        ValueError: the shares exceed 1.
        DatasetError: a folder does not hold the dataset.
    """
    parsed = [(name, *_folder_and_share(folder)) for name, folder in arguments]
    given = sum(share for *_, share in parsed if share is not None)
    open_shares = sum(share is None for *_, share in parsed)
    if given > 1 + 1e-9 or (open_shares and given >= 1):
        raise ValueError("the shares of --data add up to more than 1: lower them")
    sources = []
    for name, folder, share in parsed:
        pairs = samples(name, folder, "training")
        sequences = sorted(
            {pair.sequence for pair in pairs}, key=lambda text: zlib.crc32(text.encode())
        )
        number = math.ceil(holdout * len(sequences)) if len(sequences) > 1 else 0
        held = set(sequences[:number])
        held_out = [pair for pair in pairs if pair.sequence in held]
        step = max(1, math.ceil(len(held_out) / HELD_OUT_PAIRS))
        sources.append(
            Source(
                name,
                [pair for pair in pairs if pair.sequence not in held],
                held_out[::step],
                (1 - given) / open_shares if share is None else share,
            )
        )
    return sources


def _folder_and_share(text: str) -> tuple[Path, float | None]:
    folder, separator, share = text.rpartition(":")
    if separator and not Path(text).exists():
        try:
            return Path(folder), float(share)
        except ValueError:
            pass
    return Path(text), None


class _Crops(Dataset[Crop]):
    """Crops by index; an index always gives the same crop."""

    def __init__(self, sources: list[Source], crop: tuple[int, int], seed: int) -> None:
        self.sources, self.crop, self.seed = sources, crop, seed

    def __getitem__(self, index: int) -> Crop:
        torch.set_num_threads(1)
        random = torch.Generator().manual_seed(self.seed + index)
        shares = torch.tensor([source.share for source in self.sources])
        source = self.sources[int(torch.multinomial(shares, 1, generator=random))]
        number = int(torch.randint(len(source.training), (1,), generator=random))
        return augment(read_sample(source.training[number]), self.crop, random)


def load_crops(
    sources: list[Source], crop: tuple[int, int], seed: int, first: int
) -> Iterator[Crop]:
    """Load crops `first`, `first + 1`, … of an endless series, ahead of their use."""
    return iter(
        DataLoader(
            _Crops(sources, crop, seed),
            batch_size=None,
            sampler=count(first),
            num_workers=max(1, len(os.sched_getaffinity(0)) - 1),
            # CUDA and other libraries' threads do not survive a fork.
            multiprocessing_context="spawn",
        )
    )


def augment(pair: Pair, crop: tuple[int, int], random: torch.Generator) -> Crop:
    """Cut a transformed crop out of a pair.

    Pixel p of the crop shows point T p of the first frame (T may mirror it) and point T D p of the
    second. If the true flow moves T p to r, the crop's flow moves p to (T D)^-1 r.
    """
    height, width = pair.flow.shape[:2]
    transform = _placed(crop, (height, width), random)
    relative = _affine(
        _uniform(random, -RELATIVE_ROTATION, RELATIVE_ROTATION),
        math.exp(_uniform(random, -RELATIVE_SCALE, RELATIVE_SCALE)),
        1.0,
        (crop[1] / 2, crop[0] / 2),
        (
            crop[1] / 2 + _uniform(random, -RELATIVE_SHIFT, RELATIVE_SHIFT),
            crop[0] / 2 + _uniform(random, -RELATIVE_SHIFT, RELATIVE_SHIFT),
        ),
    )
    y, x = torch.meshgrid(
        torch.arange(crop[0], dtype=torch.float64),
        torch.arange(crop[1], dtype=torch.float64),
        indexing="ij",
    )
    points = torch.stack([x, y, torch.ones_like(x)])
    frames = []
    for frame, matrix in zip(pair.frames, (transform, transform @ relative), strict=True):
        position = torch.einsum("ij,jhw->ihw", matrix[:2], points)
        size = torch.tensor([width, height]).view(2, 1, 1)
        grid = ((position + 0.5) / size * 2 - 1).permute(1, 2, 0).float()
        pixels = torch.from_numpy(np.ascontiguousarray(frame)).permute(2, 0, 1).float()
        frames.append(
            F.grid_sample(pixels[None], grid[None], padding_mode="border", align_corners=False)[0]
        )
    source = torch.einsum("ij,jhw->ihw", transform[:2], points)
    # Take the nearest vector without interpolation, because true flow may be sparse and has edges.
    column, row = source.round().long()
    inside = (column >= 0) & (row >= 0) & (column < width) & (row < height)
    index = (row.clamp(0, height - 1) * width + column.clamp(0, width - 1)).flatten()

    def nearest(values: Tensor) -> Tensor:
        return values.flatten(0, 1)[index].view(*crop, *values.shape[2:])

    vectors = nearest(torch.from_numpy(pair.flow)).permute(2, 0, 1).double()
    valid = nearest(torch.from_numpy(pair.valid)) & inside
    back = torch.linalg.inv(transform @ relative)
    target = torch.cat([source + vectors, points[2:]])
    flow = (torch.einsum("ij,jhw->ihw", back[:2], target) - points[:2]).float()
    occluded = torch.zeros(crop, dtype=torch.bool)
    if pair.occluded is not None:
        occluded = nearest(torch.from_numpy(pair.occluded))
    return Crop(
        torch.stack(frames).round().clamp(0, 255).to(torch.uint8), flow * valid, occluded, valid
    )


def _placed(crop: tuple[int, int], size: tuple[int, int], random: torch.Generator) -> Tensor:
    """Return a random transformation [3, 3] from a crop to an image.

    The whole crop lies inside the image if a few attempts find such a transformation.
    """
    least = max(crop[0] / size[0], crop[1] / size[1])
    centre = (crop[1] / 2, crop[0] / 2)
    mirror = -1.0 if _uniform(random, 0, 1) < 0.5 else 1.0
    corners = torch.tensor(
        [[0, 0, 1], [crop[1] - 1, 0, 1], [0, crop[0] - 1, 1], [crop[1] - 1, crop[0] - 1, 1]]
    ).T.double()
    for _ in range(ATTEMPTS):
        scale = max(least, math.exp(_uniform(random, math.log(SCALE[0]), math.log(SCALE[1]))))
        matrix = _affine(
            _uniform(random, -ROTATION, ROTATION),
            1 / scale,
            mirror,
            centre,
            (_uniform(random, 0, size[1]), _uniform(random, 0, size[0])),
        )
        x, y, _ = matrix @ corners
        if x.min() >= 0 and y.min() >= 0 and x.max() <= size[1] - 1 and y.max() <= size[0] - 1:
            return matrix
    return _affine(0.0, 1 / max(1.0, least), mirror, centre, ((size[1] - 1) / 2, (size[0] - 1) / 2))


def _affine(
    angle: float,
    scale: float,
    mirror: float,
    centre: tuple[float, float],
    target: tuple[float, float],
) -> Tensor:
    """Return the matrix [3, 3] that rotates, scales and mirrors, and moves `centre` to `target`."""
    cos, sin = scale * math.cos(angle), scale * math.sin(angle)
    linear = torch.tensor([[cos * mirror, -sin], [sin * mirror, cos]], dtype=torch.float64)
    shift = torch.tensor(target, dtype=torch.float64) - linear @ torch.tensor(
        centre, dtype=torch.float64
    )
    matrix = torch.eye(3, dtype=torch.float64)
    matrix[:2, :2], matrix[:2, 2] = linear, shift
    return matrix


def _uniform(random: torch.Generator, low: float, high: float) -> float:
    return low + (high - low) * float(torch.rand((), generator=random))

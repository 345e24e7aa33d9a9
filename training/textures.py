"""Textures for the generated layers: photographs, cut-outs and procedural patterns.

Every draw cuts a new piece out of a photograph that `training.collect` has stored.
"""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

TILE_SIZE = 448
LEAST_CROP = 320  # smallest side of a square cut from a photograph, in pixels
PROCEDURAL_TILES = 0.2  # share of procedural tiles
PROCEDURAL_CUTOUTS = 0.35


class _Files:
    """The pictures of a folder, drawn at random.

    The probability of a package grows as the square root of its number of pictures.
    """

    def __init__(self, folder: Path) -> None:
        self.paths = sorted(folder.iterdir())
        packages = [path.name.rpartition("_")[0] for path in self.paths]
        counts = Counter(packages)
        self.weights = torch.tensor([counts[package] ** -0.5 for package in packages])

    def draw(self, random: torch.Generator) -> Path:
        return self.paths[int(torch.multinomial(self.weights, 1, generator=random))]


class TextureSource(Protocol):
    """Source of textures, drawn with a random generator on the CPU."""

    def tiles(self, count: int, random: torch.Generator) -> Tensor:
        """Draw textures, uint8 [count, 3, 448, 448]."""

    def outlines(self, count: int, size: int, random: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw cut-outs, uint8 [count, 4, size, size] with straight alpha.

        The second value is a mask, bool [count], that is True for shapes without colour.
        """


class Textures:
    """Textures from the photographs and cut-outs below `folder`; procedural without a folder."""

    def __init__(self, folder: Path | None = None) -> None:
        random = torch.Generator().manual_seed(1)
        self.procedural = procedural_tiles(32, random)
        self.shapes = procedural_shapes(160, random)
        self.photos = _Files(folder / "photos") if folder else None
        self.cutouts = _Files(folder / "cutouts") if folder else None

    def tiles(self, count: int, random: torch.Generator) -> Tensor:
        tiles = []
        for _ in range(count):
            if self.photos is None or _uniform(random) < PROCEDURAL_TILES:
                tiles.append(self.procedural[_integer(len(self.procedural), random)])
            else:
                tiles.append(_tile(self.photos.draw(random), random))
        return torch.stack(tiles)

    def outlines(self, count: int, size: int, random: torch.Generator) -> tuple[Tensor, Tensor]:
        found, colourless = [], []
        for _ in range(count):
            procedural = self.cutouts is None or _uniform(random) < PROCEDURAL_CUTOUTS
            colourless.append(procedural)
            if self.cutouts is None or procedural:
                shape = self.shapes[_integer(len(self.shapes), random)].float()
                sized = F.interpolate(shape[None], (size, size), mode="bilinear", antialias=True)
                found.append(sized[0].round().to(torch.uint8))
            else:
                found.append(_cutout(self.cutouts.draw(random), size))
        return torch.stack(found), torch.tensor(colourless)


def _uniform(random: torch.Generator) -> float:
    return float(torch.rand((), generator=random))


def _integer(below: int, random: torch.Generator) -> int:
    return int(torch.randint(below, (), generator=random))


def _channels(picture: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def _tile(path: Path, random: torch.Generator) -> Tensor:
    """Cut a random square out of a photograph, with a side from LEAST_CROP to the shorter side."""
    with Image.open(path) as photo:
        shorter = min(photo.size)
        side = round(LEAST_CROP * (shorter / LEAST_CROP) ** _uniform(random))
        left = _integer(photo.width - side + 1, random)
        top = _integer(photo.height - side + 1, random)
        box = (left, top, left + side, top + side)
        return _channels(photo.resize((TILE_SIZE, TILE_SIZE), Image.Resampling.BICUBIC, box))


def _cutout(path: Path, size: int) -> Tensor:
    """Centre a cut-out in a square, as large as fits with a transparent margin of one pixel."""
    with Image.open(path) as opened:
        picture = opened.convert("RGBA")
    factor = (size - 2) / max(picture.size)
    width, height = (max(1, round(side * factor)) for side in picture.size)
    picture = picture.resize((width, height), Image.Resampling.BICUBIC)
    canvas = torch.zeros(4, size, size, dtype=torch.uint8)
    top, left = (size - height) // 2, (size - width) // 2
    canvas[:, top : top + height, left : left + width] = _channels(picture)
    return canvas


def procedural_tiles(count: int, random: torch.Generator, size: int = TILE_SIZE) -> Tensor:
    """Generate coloured textures, uint8 [count, 3, size, size].

    They are noise in octaves. Half of them are quantised to flat patches with sharp edges.
    """
    texture = torch.zeros(count, 3, size, size)
    for octave in (4, 8, 16, 32, 64, 112, 224):
        noise = torch.randn(count, 3, octave, octave, generator=random)
        # Channels share most of their structure, as in photographs.
        noise = 0.7 * noise[:, :1] + 0.5 * noise
        weight = torch.rand(count, 1, 1, 1, generator=random) * octave**-0.35
        upsampled = F.interpolate(noise, size=(size, size), mode="bicubic", align_corners=False)
        texture += weight * upsampled
    patches = torch.arange(count) % 2 == 0
    steps = 1.0 + 2.0 * torch.rand(int(patches.sum()), 1, 1, 1, generator=random)
    texture[patches] = torch.round(texture[patches] * steps * 2) / (steps * 2)
    scale = 40.0 + 50.0 * torch.rand(count, 1, 1, 1, generator=random)
    mean = 60.0 + 135.0 * torch.rand(count, 3, 1, 1, generator=random)
    deviation = texture.std(dim=(2, 3), keepdim=True).mean(dim=1, keepdim=True)
    return (texture / deviation * scale + mean).clamp(0, 255).to(torch.uint8)


def procedural_shapes(count: int, random: torch.Generator, size: int = 128) -> Tensor:
    """Generate black shapes, uint8 [count, 4, size, size]: blobs, stars, rings and polygons."""
    axis = (torch.arange(size) + 0.5) / size * 2 - 1
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    angle, radius = torch.atan2(y, x), torch.hypot(x, y)
    order = torch.arange(1, 9).view(1, 8, 1, 1)
    amplitude = torch.randn(count, 8, 1, 1, generator=random) * 0.25 / order
    phase = torch.rand(count, 8, 1, 1, generator=random) * 2 * math.pi
    outline = 0.6 + (amplitude * torch.cos(order * angle + phase)).sum(1)
    outline = outline.clamp(0.15, 0.95)
    inside = outline - radius
    ring = torch.rand(count, 1, 1, generator=random) < 0.2
    inside = torch.where(ring, torch.minimum(inside, 0.15 - inside), inside)
    # Polygons: the intersection of half-planes.
    corners = torch.randint(3, 7, (count, 1, 1, 1), generator=random)
    side = torch.arange(6).view(1, 6, 1, 1)
    direction = side * 2 * math.pi / corners + phase[:, :1]
    distance = 0.6 - (x * torch.cos(direction) + y * torch.sin(direction))
    distance = torch.where(side < corners, distance, torch.full_like(distance, 9.0))
    polygon = torch.rand(count, 1, 1, generator=random) < 0.4
    inside = torch.where(polygon, distance.min(dim=1).values, inside)
    alpha = (inside * size / 2 + 0.5).clamp(0, 1)
    masks = torch.zeros(count, 4, size, size)
    masks[:, 3] = alpha * 255
    return masks.to(torch.uint8)

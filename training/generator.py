"""Image pairs with exact optical flow, in the spirit of FlyingChairs: layers that move over layers.

Every scene is a textured background and several foreground objects. A layer lives in canonical
coordinates, the pixel grid of frame 0. Its motion from frame 0 to frame 1 is a homography M (with
translation, rotation, scale and, for backgrounds, perspective), after a smooth non-rigid field w:

    frame 0 shows at pixel x the layer's texture at A (x + w(x)),
    frame 1 shows at pixel y the layer's texture at A M^-1 y,
    so the flow at x is exactly M (x + w(x)) - x.

Nothing is inverted numerically, so the flow is exact to float32 rounding. Everything that is drawn
at random comes from one seeded CPU generator; the pixel work runs on any device. A seed gives the
same scenes on every device up to rounding.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

# Object slots of a scene, back to front: texture side in pixels. Each is there with PRESENCE.
OBJECT_SIZES = (224, 224, 80, 224, 80, 80, 80)
PRESENCE = 0.75
BACKGROUND_SIZE = 448


@dataclass(frozen=True)
class Scenes:
    """A batch of rendered pairs.

    `frames` uint8 [2, N, 3, H, W] (RGB); `flow` float32 [N, 2, H, W] in pixels, u right and v
    down, from frame 0 to frame 1; `occluded` bool [N, H, W], true where the surface point that
    frame 0 shows is hidden in frame 1 or outside of it.
    """

    frames: Tensor
    flow: Tensor
    occluded: Tensor


@dataclass(frozen=True)
class Textures:
    """`photos` uint8 [P, 3, 448, 448]; `cutouts` uint8 [K, 4, 128, 128]; the last `masks` of the
    cut-outs are shapes without a colour of their own."""

    photos: Tensor
    cutouts: Tensor
    masks: int


def procedural_photos(count: int, random: torch.Generator, size: int = BACKGROUND_SIZE) -> Tensor:
    """`count` coloured textures, uint8 [count, 3, size, size]: noise in octaves, half of them cut
    into flat patches with sharp edges."""
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


def procedural_masks(count: int, random: torch.Generator, size: int = 128) -> Tensor:
    """`count` shapes, uint8 [count, 4, size, size], colour zero: blobs, stars, rings and bars."""
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


def load_textures(path: Path | None, device: torch.device | str = "cpu") -> Textures:
    """Textures from a file of `training.textures` joined with procedural ones, or those alone."""
    random = torch.Generator().manual_seed(1)
    photos = procedural_photos(32, random)
    cutouts = procedural_masks(160, random)
    masks = len(cutouts)
    if path is not None:
        with np.load(path, allow_pickle=False) as packed:
            photos = torch.cat([photos, torch.from_numpy(packed["photos"]).permute(0, 3, 1, 2)])
            cutouts = torch.cat([torch.from_numpy(packed["cutouts"]).permute(0, 3, 1, 2), cutouts])
    return Textures(photos.contiguous().to(device), cutouts.contiguous().to(device), masks)


class _Random:
    """Draws of shape [count] from one CPU generator, in double precision."""

    def __init__(self, seed: int, count: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.count = count

    def uniform(self, low: float, high: float) -> Tensor:
        value = torch.rand(self.count, generator=self.generator, dtype=torch.float64)
        return low + (high - low) * value

    def normal(self) -> Tensor:
        return torch.randn(self.count, generator=self.generator, dtype=torch.float64)

    def chance(self, probability: float) -> Tensor:
        return self.uniform(0, 1) < probability

    def integer(self, low: int, high: int) -> Tensor:
        return torch.randint(low, high, (self.count,), generator=self.generator)


def _matrix(rows: list[list[Tensor | float]], count: int) -> Tensor:
    """[count, 3, 3] float64 from nine tensors of shape [count] or numbers."""
    return torch.stack(
        [
            torch.stack([torch.as_tensor(e, dtype=torch.float64).expand(count) for e in row], -1)
            for row in rows
        ],
        -2,
    )


def _similarity(
    center: tuple[Tensor, Tensor], shift: tuple[Tensor, Tensor], angle: Tensor, scale: Tensor
) -> Tensor:
    """Rotation and scaling about `center`, then a shift: [N, 3, 3]."""
    cos, sin = scale * torch.cos(angle), scale * torch.sin(angle)
    x, y = center
    return _matrix(
        [
            [cos, -sin, x + shift[0] - cos * x + sin * y],
            [sin, cos, y + shift[1] - sin * x - cos * y],
            [0.0, 0.0, 1.0],
        ],
        len(angle),
    )


def _texture_map(
    center: tuple[Tensor, Tensor], angle: Tensor, half_width: Tensor, half_height: Tensor
) -> Tensor:
    """Canonical pixels to normalised texture coordinates (-1..1 across the texture)."""
    cos, sin = torch.cos(angle), torch.sin(angle)
    x, y = center
    return _matrix(
        [
            [cos / half_width, sin / half_width, -(cos * x + sin * y) / half_width],
            [-sin / half_height, cos / half_height, (sin * x - cos * y) / half_height],
            [0.0, 0.0, 1.0],
        ],
        len(angle),
    )


def _shift(random: _Random, median: float, spread: float) -> tuple[Tensor, Tensor]:
    """A shift in a random direction with log-normal length, cut at 120 pixels."""
    length = (median * torch.exp(spread * random.normal())).clamp(max=120.0)
    direction = random.uniform(0, 2 * math.pi)
    return length * torch.cos(direction), length * torch.sin(direction)


@dataclass(frozen=True)
class _Layer:
    texture: Tensor  # float32 [N, 3 or 4, S, S], 0..1
    texture_map: Tensor  # A, [N, 3, 3]
    motion: Tensor  # M, [N, 3, 3]
    bend: Tensor | None  # w, [N, 2, H, W]


def _bend(random: _Random, height: int, width: int, size: float, device: torch.device) -> Tensor:
    """A smooth field of displacements in pixels, [N, 2, H, W], some of them zero."""
    cells = (random.count, 2, 3 + height // 96, 3 + width // 96)
    coarse = torch.randn(cells, generator=random.generator)
    strength = size * torch.exp(0.7 * random.normal()) * random.chance(0.6)
    coarse = coarse * strength.clamp(max=8.0).float().view(-1, 1, 1, 1)
    field = F.interpolate(
        coarse.to(device), size=(height, width), mode="bicubic", align_corners=True
    )
    return field


def _background(
    random: _Random, textures: Textures, height: int, width: int, displacement: float
) -> _Layer:
    device = textures.photos.device
    center = (random.uniform(0, width), random.uniform(0, height))
    motion = _similarity(
        center,
        _shift(random, 3.0 * displacement, 1.1),
        random.normal() * 0.025 * displacement * random.chance(0.7),
        torch.exp(random.normal() * 0.025 * displacement * random.chance(0.7)),
    )
    tilt = 4e-5 * displacement * random.chance(0.4)
    perspective = _matrix(
        [
            [1.0, random.normal() * 0.02 * displacement, 0.0],
            [0.0, 1.0, 0.0],
            [random.normal() * tilt, random.normal() * tilt, 1.0],
        ],
        random.count,
    )
    half = BACKGROUND_SIZE / 2 / random.uniform(0.55, 1.15)
    texture_map = _texture_map(center, random.uniform(0, 2 * math.pi), half, half)
    bend = _bend(random, height, width, 1.5 * displacement, device)
    # Two photographs mixed, now and then, double the variety.
    first = textures.photos[random.integer(0, len(textures.photos)).to(device)].float()
    second = textures.photos[random.integer(0, len(textures.photos)).to(device)].float()
    mix = (random.uniform(0.2, 0.5) * random.chance(0.25)).float().to(device).view(-1, 1, 1, 1)
    return _Layer(torch.lerp(first, second, mix) / 255, texture_map, motion @ perspective, bend)


def _object(
    random: _Random,
    textures: Textures,
    size: int,
    height: int,
    width: int,
    displacement: float,
    background: Tensor,
) -> _Layer:
    device = textures.photos.device
    count = random.count
    center = (random.uniform(0, width), random.uniform(0, height))
    own = _similarity(
        center,
        _shift(random, 4.0 * displacement, 1.1),
        random.normal() * 0.12 * displacement * random.chance(0.7),
        torch.exp(random.normal() * 0.07 * displacement * random.chance(0.7)),
    )
    carried = random.chance(0.7).view(-1, 1, 1)
    motion = torch.where(carried, background @ own, own)
    half = size / 2 * torch.exp(random.uniform(-0.4, 0.35))
    thin = torch.where(random.chance(0.15), random.uniform(0.08, 0.25), random.uniform(0.6, 1.2))
    present = random.chance(PRESENCE)
    far = 4.0 * (height + width)
    center = (torch.where(present, center[0], torch.full_like(half, far)), center[1])
    texture_map = _texture_map(center, random.uniform(0, 2 * math.pi), half, half * thin)

    which = random.integer(0, len(textures.cutouts))
    stamps = textures.cutouts[which.to(device)].float()
    stamps = F.interpolate(
        stamps, size=(size, size), mode="bilinear", antialias=True, align_corners=False
    )
    mask_only = which >= len(textures.cutouts) - textures.masks
    from_photo = (mask_only | random.chance(0.4)).to(device).view(-1, 1, 1, 1)
    photo = random.integer(0, len(textures.photos))
    left = random.integer(0, BACKGROUND_SIZE - size)
    top = random.integer(0, BACKGROUND_SIZE - size)
    crops = torch.stack(
        [
            textures.photos[photo[n], :, top[n] : top[n] + size, left[n] : left[n] + size]
            for n in range(count)
        ]
    ).float()
    colour = torch.where(from_photo, crops, stamps[:, :3])
    bend = None
    if size > 100:
        bend = _bend(random, height, width, 1.0 * displacement, device)
    return _Layer(torch.cat([colour, stamps[:, 3:]], 1) / 255, texture_map, motion, bend)


def _project(
    matrix: Tensor, height: int, width: int, bend: Tensor | None, device: torch.device
) -> Tensor:
    """Pixels (moved by `bend` first) under [N, 3, 3] float64 homographies: [N, H, W, 2] float32.

    Written out by rows, columns and bend: a matrix product with three columns is slow everywhere.
    """
    affine = bool((matrix[:, 2, :2] == 0).all())
    matrix = matrix.to(torch.float32)
    x = torch.arange(width, dtype=torch.float32)
    y = torch.arange(height, dtype=torch.float32)
    entries = matrix.to(device)
    mapped = []
    for row in range(2 if affine else 3):
        by_column = matrix[:, row, :1] * x
        by_row = matrix[:, row, 1:2] * y + matrix[:, row, 2:]
        value = by_column[:, None, :].to(device) + by_row[:, :, None].to(device)
        if bend is not None:
            value.addcmul_(entries[:, row, 0].view(-1, 1, 1), bend[:, 0])
            value.addcmul_(entries[:, row, 1].view(-1, 1, 1), bend[:, 1])
        mapped.append(value)
    points = torch.stack(mapped[:2], -1)
    return points if affine else points.div_(mapped[2][..., None])


def _composite(layers: list[_Layer], sampling: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Image [N, 3, H, W] in 0..1 and each object's alpha [N, H, W], back to front."""
    image = F.grid_sample(
        layers[0].texture,
        sampling[0],
        padding_mode="reflection",
        align_corners=False,
    )
    alphas = []
    for layer, grid in zip(layers[1:], sampling[1:], strict=True):
        sample = F.grid_sample(
            layer.texture,
            grid,
            padding_mode="zeros",
            align_corners=False,
        )
        image = torch.lerp(image, sample[:, :3], sample[:, 3:])
        alphas.append(sample[:, 3])
    return image, alphas


def _top_layer(alphas: list[Tensor], shape: tuple[int, int, int], device: torch.device) -> Tensor:
    """Index of the front-most layer that is more than half opaque, int64 [N, H, W]."""
    index = torch.zeros(shape, dtype=torch.int64, device=device)
    for number, alpha in enumerate(alphas, start=1):
        index[alpha > 0.5] = number
    return index


@torch.no_grad()
def render(
    seed: int,
    count: int,
    height: int,
    width: int,
    textures: Textures,
    displacement: float = 1.0,
    blur: bool | None = None,
) -> Scenes:
    """Render `count` scenes of one seed, on the device of `textures`.

    `displacement` scales every motion: 1 gives a median of a few pixels with a tail beyond 100,
    0.1 the small motions that FlowNet2-SD is trained on. `blur` forces motion blur on or off; left
    out, one batch in ten has it.
    """
    random = _Random(seed, count)
    device = textures.photos.device
    layers = [_background(random, textures, height, width, displacement)]
    for size in OBJECT_SIZES:
        layers.append(
            _object(random, textures, size, height, width, displacement, layers[0].motion)
        )
    shutter = random.uniform(0.1, 0.5)
    blurred = bool(random.chance(0.1)[0]) if blur is None else blur

    identity = torch.eye(3, dtype=torch.float64)
    frames = torch.zeros(2, count, 3, height, width, device=device)
    tops: list[Tensor] = []
    times = (0.0, -0.5, 0.5) if blurred else (0.0,)
    for time in times:
        # During the exposure every layer moves on by a part of its motion.
        drifts = [
            identity + (layer.motion - identity) * (time * shutter).view(-1, 1, 1)
            for layer in layers
        ]
        for frame in range(2):
            sampling = []
            for layer, drift in zip(layers, drifts, strict=True):
                if frame == 0:
                    matrix, bend = layer.texture_map @ torch.inverse(drift), layer.bend
                else:
                    matrix, bend = layer.texture_map @ torch.inverse(layer.motion @ drift), None
                sampling.append(_project(matrix, height, width, bend, device))
            image, alphas = _composite(layers, sampling)
            frames[frame] += image / len(times)
            if time == 0.0:
                tops.append(_top_layer(alphas, (count, height, width), device))

    target = torch.zeros(count, height, width, 2, device=device)
    for number, layer in enumerate(layers):
        moved = _project(layer.motion, height, width, layer.bend, device)
        target = torch.where((tops[0] == number)[..., None], moved, target)
    y, x = torch.meshgrid(
        torch.arange(height, device=device), torch.arange(width, device=device), indexing="ij"
    )
    flow = (target - torch.stack([x, y], -1)).permute(0, 3, 1, 2)

    nearest = torch.round(target).long()
    inside = (nearest >= 0).all(-1) & (nearest[..., 0] < width) & (nearest[..., 1] < height)
    flat = nearest[..., 1].clamp(0, height - 1) * width + nearest[..., 0].clamp(0, width - 1)
    seen = tops[1].flatten(1).gather(1, flat.flatten(1)).view(count, height, width)
    return Scenes(
        frames=(frames * 255).round().clamp(0, 255).to(torch.uint8),
        flow=flow.contiguous(),
        occluded=~inside | (seen != tops[0]),
    )

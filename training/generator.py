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
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from training.textures import TILE_SIZE, TextureSource

# Object slots of a scene, back to front: texture side in pixels. Each is there with PRESENCE.
OBJECT_SIZES = (320, 224, 112, 224, 80, 112, 80, 56, 56)
PRESENCE = 0.7
# Shares of the batches that have an effect, and of the layers that are out of focus.
MOTION_BLUR, FOG, DEFOCUS = 0.15, 0.15, 0.15


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


class _Random:
    """Draws of shape [count] from one CPU generator, in double precision."""

    def __init__(self, seed: int, count: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.count = count

    def uniform(self, low: float, high: float) -> Tensor:
        values = torch.empty(self.count, dtype=torch.float64)
        return values.uniform_(low, high, generator=self.generator)

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
    centre: tuple[Tensor, Tensor], shift: tuple[Tensor, Tensor], angle: Tensor, scale: Tensor
) -> Tensor:
    """Rotation and scaling about `centre`, then a shift: [N, 3, 3]."""
    cos, sin = scale * torch.cos(angle), scale * torch.sin(angle)
    x, y = centre
    return _matrix(
        [
            [cos, -sin, x + shift[0] - cos * x + sin * y],
            [sin, cos, y + shift[1] - sin * x - cos * y],
            [0.0, 0.0, 1.0],
        ],
        len(angle),
    )


def _texture_map(
    centre: tuple[Tensor, Tensor], angle: Tensor, half_width: Tensor, half_height: Tensor
) -> Tensor:
    """Canonical pixels to normalised texture coordinates (-1..1 across the texture)."""
    cos, sin = torch.cos(angle), torch.sin(angle)
    x, y = centre
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
    texture: Tensor  # float32 [N, 3, S, S] or, colours times alpha and alpha, [N, 4, S, S]; 0..1
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


def _camera(random: _Random, height: int, width: int, displacement: float) -> Tensor:
    """Homographies R + t n^T / d of a plane seen by a camera that turns and moves (Hartley and
    Zisserman, Multiple View Geometry, eq. 13.2): [N, 3, 3].

    The focal length is the image's width. The plane is slanted by up to some 50 degrees, so that
    its near parts move farther than its far ones; all of it lies before the camera.
    """
    slant = [random.normal().mul(0.5).clamp(-0.9, 0.9) for _ in range(2)]
    normal = _matrix([[slant[0], slant[1], 1.0]], random.count)
    travel = _matrix([[random.normal() * 0.02] for _ in range(3)], random.count)
    x, y, z = (random.normal() * 0.008 for _ in range(3))
    turn = _matrix([[1.0, -z, y], [z, 1.0, -x], [-y, x, 1.0]], random.count)
    identity = torch.eye(3, dtype=torch.float64)
    motion = identity + displacement * (turn - identity + travel @ normal)
    motion = torch.where(random.chance(0.5).view(-1, 1, 1), motion, identity)
    calibration = torch.tensor(
        [[width, 0.0, width / 2], [0.0, width, height / 2], [0.0, 0.0, 1.0]], dtype=torch.float64
    )
    return calibration @ motion @ torch.inverse(calibration)


def _background(
    random: _Random, tiles: Tensor, height: int, width: int, displacement: float
) -> _Layer:
    centre = (random.uniform(0, width), random.uniform(0, height))
    motion = _similarity(
        centre,
        _shift(random, 3.0 * displacement, 1.1),
        random.normal() * 0.025 * displacement * random.chance(0.7),
        torch.exp(random.normal() * 0.025 * displacement * random.chance(0.7)),
    )
    camera = _camera(random, height, width, displacement)
    half = TILE_SIZE / 2 / random.uniform(0.55, 1.15)
    texture_map = _texture_map(centre, random.uniform(0, 2 * math.pi), half, half)
    bend = _bend(random, height, width, 1.5 * displacement, tiles.device)
    # Two photographs mixed, now and then, double the variety.
    mix = (random.uniform(0.2, 0.5) * random.chance(0.25)).float().to(tiles.device)
    texture = torch.lerp(tiles, tiles.roll(1, 0), mix.view(-1, 1, 1, 1))
    return _Layer(texture, texture_map, motion @ camera, bend)


def _object(
    random: _Random,
    textures: TextureSource,
    tiles: Tensor,
    size: int,
    height: int,
    width: int,
    displacement: float,
    background: Tensor,
) -> _Layer:
    count = random.count
    centre = (random.uniform(0, width), random.uniform(0, height))
    own = _similarity(
        centre,
        _shift(random, 4.0 * displacement, 1.1),
        random.normal() * 0.12 * displacement * random.chance(0.7),
        torch.exp(random.normal() * 0.07 * displacement * random.chance(0.7)),
    )
    carried = random.chance(0.7).view(-1, 1, 1)
    motion = torch.where(carried, background @ own, own)
    half = size / 2 * torch.exp(random.uniform(-0.4, 0.35))
    thin = torch.where(random.chance(0.25), random.uniform(0.04, 0.2), random.uniform(0.6, 1.2))
    present = random.chance(PRESENCE)
    far = 4.0 * (height + width)
    centre = (torch.where(present, centre[0], torch.full_like(half, far)), centre[1])
    texture_map = _texture_map(centre, random.uniform(0, 2 * math.pi), half, half * thin)

    drawn, colourless = textures.outlines(count, size, random.generator)
    outlines = drawn.to(tiles.device, non_blocking=True) / 255
    from_photo = (colourless | random.chance(0.4)).to(tiles.device)
    # Photographs that lie behind other scenes of the batch.
    others = tiles.roll(1 + int(random.integer(0, count)[0]), 0)
    left, top = (int(random.integer(0, TILE_SIZE - size)[0]) for _ in range(2))
    crops = others[:, :, top : top + size, left : left + size]
    colour = torch.where(from_photo.view(-1, 1, 1, 1), crops, outlines[:, :3])
    bend = _bend(random, height, width, displacement, tiles.device) if size > 100 else None
    alpha = outlines[:, 3:]
    return _Layer(torch.cat([colour * alpha, alpha], 1), texture_map, motion, bend)


def _defocused(texture: Tensor, radius: int) -> Tensor:
    """`texture` under a box filter of 2 radius + 1 pixels, twice along each axis."""
    for kernel in ((2 * radius + 1, 1), (1, 2 * radius + 1)) * 2:
        padding = (kernel[0] // 2, kernel[1] // 2)
        texture = F.avg_pool2d(texture, kernel, 1, padding, count_include_pad=False)
    return texture


def _fogged(layers: list[_Layer], random: _Random) -> list[_Layer]:
    """The layers behind a grey fog that is denser the farther back they are."""
    grey = random.uniform(0.4, 0.9).float().view(-1, 1, 1, 1)
    density = random.uniform(0.3, 0.8).float().view(-1, 1, 1, 1)
    fogged = []
    for number, layer in enumerate(layers):
        share = (density * (1 - number / len(layers))).to(layer.texture.device)
        colour = layer.texture[:, :3]
        veil = grey.to(colour.device) * (layer.texture[:, 3:] if number else 1.0)
        colour = torch.lerp(colour, veil.expand_as(colour), share)
        fogged.append(replace(layer, texture=torch.cat([colour, layer.texture[:, 3:]], 1)))
    return fogged


def _project(
    matrix: Tensor, height: int, width: int, bend: Tensor | None, device: torch.device
) -> Tensor:
    """Pixels (moved by `bend` first) under [N, 3, 3] float64 homographies: [N, H, W, 2] float32.

    Written out by rows, columns and bend: a matrix product with three columns is slow everywhere.
    """
    affine = bool((matrix[:, 2, :2] == 0).all())
    entries = matrix[:, : 2 if affine else 3].to(device, torch.float32)
    x = torch.arange(width, dtype=torch.float32, device=device)
    y = torch.arange(height, dtype=torch.float32, device=device)
    by_column = entries[:, :, :1] * x
    by_row = entries[:, :, 1:2] * y + entries[:, :, 2:]
    mapped = by_column[:, :, None, :] + by_row[:, :, :, None]
    if bend is not None:
        mapped.addcmul_(entries[:, :, 0, None, None], bend[:, None, 0])
        mapped.addcmul_(entries[:, :, 1, None, None], bend[:, None, 1])
    points = mapped[:, :2].permute(0, 2, 3, 1)
    return points if affine else points / mapped[:, 2, :, :, None]


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
        image = sample[:, :3] + image * (1 - sample[:, 3:])
        alphas.append(sample[:, 3])
    return image, alphas


def _top_layer(alphas: list[Tensor], shape: tuple[int, int, int], device: torch.device) -> Tensor:
    """Index of the front-most layer that is more than half opaque, int64 [N, H, W]."""
    index = torch.zeros(shape, dtype=torch.int64, device=device)
    for number, alpha in enumerate(alphas, start=1):
        index[alpha > 0.5] = number
    return index


def _render_layers(layers: list[_Layer], height: int, width: int, shutter: Tensor | None) -> Scenes:
    """Both frames of layers, back to front, and their flow; `shutter` [N] is the share of the
    motion that passes during an exposure."""
    identity = torch.eye(3, dtype=torch.float64)
    device, count = layers[0].texture.device, len(layers[0].texture)
    frames = torch.zeros(2, count, 3, height, width, device=device)
    tops: list[Tensor] = []
    times = (0.0,) if shutter is None else (0.0, -0.5, 0.5)
    for time in times:
        # During the exposure every layer moves on by a part of its motion.
        share = 0.0 if shutter is None else (time * shutter).view(-1, 1, 1)
        drifts = [identity + (layer.motion - identity) * share for layer in layers]
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


@torch.no_grad()
def render(
    seed: int,
    count: int,
    height: int,
    width: int,
    textures: TextureSource,
    displacement: float = 1.0,
    effects: bool = True,
    device: torch.device | str = "cpu",
) -> Scenes:
    """Render `count` scenes of one seed.

    `displacement` scales every motion: 1 gives a median of a few pixels with a tail beyond 100,
    0.1 the small motions that FlowNet2-SD is trained on. `effects` off leaves out motion blur, fog
    and defocus.
    """
    layers, shutter = compose(seed, count, height, width, textures, displacement, effects, device)
    return _render_layers(layers, height, width, shutter)


def compose(
    seed: int,
    count: int,
    height: int,
    width: int,
    textures: TextureSource,
    displacement: float = 1.0,
    effects: bool = True,
    device: torch.device | str = "cpu",
) -> tuple[list[_Layer], Tensor | None]:
    """The layers of :func:`render`, back to front, and the shutter if there is motion blur."""
    random = _Random(seed, count)
    drawn = textures.tiles(count, random.generator)
    tiles = drawn.to(device, non_blocking=True).float() / 255
    layers = [_background(random, tiles, height, width, displacement)]
    layers += [
        _object(random, textures, tiles, size, height, width, displacement, layers[0].motion)
        for size in OBJECT_SIZES
    ]
    shutter = random.uniform(0.1, 0.5)
    blurred = effects and bool(random.chance(MOTION_BLUR)[0])
    if effects:
        for number in range(len(layers)):
            radius = int(random.integer(1, 4)[0])
            if random.chance(DEFOCUS)[0]:
                texture = _defocused(layers[number].texture, radius)
                layers[number] = replace(layers[number], texture=texture)
        if random.chance(FOG)[0]:
            layers = _fogged(layers, random)
    return layers, shutter if blurred else None

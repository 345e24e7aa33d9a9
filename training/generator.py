"""Image pairs with exact optical flow, similar to FlyingChairs: textured layers that move.

Every scene is a textured background and several foreground objects. A layer lives in canonical
coordinates, the pixel grid of frame 0. Its motion from frame 0 to frame 1 is a homography M (with
translation, rotation, scale and, for backgrounds, perspective), after a smooth non-rigid field w:

    frame 0 shows at pixel x the layer's texture at A (x + w(x)),
    frame 1 shows at pixel y the layer's texture at A M^-1 y,
    so the flow at x is exactly M (x + w(x)) - x.

No field is inverted numerically, so the flow is exact up to float32 rounding. All random numbers
come from one seeded CPU generator, and pixels are computed on any device: a seed gives the same
scenes on every device up to rounding.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from training.textures import TILE_SIZE, TextureSource

# Objects of a scene, back to front: texture side in pixels. Each is present with probability
# PRESENCE.
OBJECT_SIZES = (320, 224, 112, 224, 80, 112, 80, 56, 56)
PRESENCE = 0.7
SMALL_MOTIONS = 0.1
"""Scale of the motions of scenes with small motions, those of FlowNet2-SD's training."""
LARGE_MOTIONS = (2.0, 4.0)
"""Range of the scale of the motions of scenes with large motions."""
NEAREST, BEHIND = 1e-6, -1e6
# Shares of batches with motion blur and fog, and of layers out of focus.
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


@dataclass(frozen=True)
class Mixture:
    """Shares of the batches that are not plain scenes.

    Attributes:
        small: motions scaled by `SMALL_MOTIONS`.
        large: motions scaled by a factor in `LARGE_MOTIONS`.
        driving: a camera that moves forward over a ground plane.
    """

    small: float = 0.0
    large: float = 0.0
    driving: float = 0.0

    def kind(self, index: int) -> tuple[float, bool]:
        """Return scale of the motions and whether the scene is a driving one, for a batch."""
        # Multiples of the golden ratio distribute the kinds evenly over any range of batches.
        position = index * 0.6180339887498949 % 1
        if position < self.small:
            return SMALL_MOTIONS, False
        position -= self.small
        if position < self.large:
            low, high = LARGE_MOTIONS
            return low + (high - low) * position / self.large, False
        return 1.0, position - self.large < self.driving


class _Random:
    """Random draws of shape [count] from one CPU generator, in double precision."""

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
    """Return [count, 3, 3] float64 from nine entries, tensors of shape [count] or numbers."""
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
    """Return a rotation and scaling about `centre`, followed by a shift: [N, 3, 3]."""
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
    """Return the map from canonical pixels to texture coordinates (-1..1 across the texture)."""
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
    """Draw shifts in random directions with log-normal lengths, clipped at 200 pixels."""
    length = (median * torch.exp(spread * random.normal())).clamp(max=200.0)
    direction = random.uniform(0, 2 * math.pi)
    return length * torch.cos(direction), length * torch.sin(direction)


@dataclass(frozen=True)
class _Layer:
    texture: Tensor  # float32 [N, 3, S, S] or, colours times alpha and alpha, [N, 4, S, S]; 0..1
    texture_map: Tensor  # A, [N, 3, 3]
    motion: Tensor  # M, [N, 3, 3]
    bend: Tensor | None  # w, [N, 2, H, W]
    # Bounds of a plane covered by reflections of its texture, in texture coordinates, [N, axis, 2].
    window: Tensor | None = None


def _bend(random: _Random, height: int, width: int, size: float, device: torch.device) -> Tensor:
    """Draw smooth fields of displacements in pixels, [N, 2, H, W]; some fields are zero."""
    cells = (random.count, 2, 3 + height // 96, 3 + width // 96)
    coarse = torch.randn(cells, generator=random.generator)
    strength = size * torch.exp(0.7 * random.normal()) * random.chance(0.6)
    coarse = coarse * strength.clamp(max=8.0).float().view(-1, 1, 1, 1)
    field = F.interpolate(
        coarse.to(device), size=(height, width), mode="bicubic", align_corners=True
    )
    return field


def _camera(random: _Random, height: int, width: int, displacement: float) -> Tensor:
    """Draw homographies R + t n^T / d [N, 3, 3] of a plane seen by a camera that turns and moves.

    See Hartley and Zisserman, Multiple View Geometry, eq. 13.2.
    The focal length is the image's width. The plane is slanted by up to some 50 degrees, so that
    its near parts move farther than its far parts. All of it is in front of the camera.
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
    # Sometimes two photographs are mixed, for more variety.
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

    texture = _object_texture(random, textures, tiles, size)
    bend = _bend(random, height, width, displacement, tiles.device) if size > 100 else None
    return _Layer(texture, texture_map, motion, bend)


def _object_texture(random: _Random, textures: TextureSource, tiles: Tensor, size: int) -> Tensor:
    """Draw cut-outs in their own or a photograph's colours, premultiplied: [N, 4, S, S]."""
    count = random.count
    drawn, colourless = textures.outlines(count, size, random.generator)
    outlines = drawn.to(tiles.device, non_blocking=True) / 255
    from_photo = (colourless | random.chance(0.4)).to(tiles.device)
    # Photographs that lie behind other scenes of the batch.
    others = tiles.roll(1 + int(random.integer(0, count)[0]), 0)
    left, top = (int(random.integer(0, TILE_SIZE - size)[0]) for _ in range(2))
    crops = others[:, :, top : top + size, left : left + size]
    colour = torch.where(from_photo.view(-1, 1, 1, 1), crops, outlines[:, :3])
    alpha = outlines[:, 3:]
    return torch.cat([colour * alpha, alpha], 1)


def _driving(
    random: _Random,
    textures: TextureSource,
    tiles: Tensor,
    height: int,
    width: int,
    displacement: float,
) -> list[_Layer]:
    """Draw road scenes: far plane, ground, two walls, and objects on the ground, back to front.

    Every layer is a plane n X = d in front of a camera that moves forward and turns slightly, so
    its motion is the homography K (R + t n^T / d) K^-1. Lengths are in units of the depth of the
    ground at the lower edge of the image.
    """
    count = random.count
    focal = width * random.uniform(0.55, 1.1)
    horizon = height * random.uniform(0.35, 0.6)
    zero = torch.zeros_like(focal)
    one = torch.ones_like(focal)
    calibration = _matrix(
        [[focal, 0.0, width / 2 + zero], [0.0, focal, horizon], [0.0, 0.0, 1.0]], count
    )
    rays = torch.inverse(calibration)
    above = (height - horizon) / focal  # height of the camera above the ground
    end = random.uniform(4.0, 10.0)  # depth of the far plane
    # At most 40 percent of the way to the nearest ground, so that everything stays in front.
    step = (0.07 * torch.exp(random.uniform(0.0, 1.8)) * displacement).clamp(max=0.4)
    angles = [random.normal() * 0.01 * displacement for _ in range(3)]
    turn = _matrix(
        [
            [1.0, -angles[2], angles[1]],
            [angles[2], 1.0, -angles[0]],
            [-angles[1], angles[0], 1.0],
        ],
        count,
    )

    def motion(normal: list[float], distance: Tensor, travel: list[Tensor]) -> Tensor:
        shift = _matrix([[value] for value in travel], count)
        plane = torch.tensor([normal], dtype=torch.float64) / distance.view(-1, 1, 1)
        return calibration @ (turn + shift @ plane) @ rays

    camera = [0.1 * step * random.normal(), zero, -step]
    opaque = torch.cat([tiles, torch.ones_like(tiles[:, :1])], 1)
    unlimited = 1e6 * one

    def plane(
        number: int, coordinates: list[list[Tensor | float]], moved: Tensor, rows: list[Tensor]
    ) -> _Layer:
        size = random.uniform(1.5, 4.0)  # half the side of the texture
        scale = _matrix([[1 / size, 0.0, 0.0], [0.0, 1 / size, 0.0], [0.0, 0.0, 1.0]], count)
        window = torch.stack([torch.stack(rows, -1), torch.stack([zero, end], -1)], 1)
        return _Layer(
            opaque.roll(number, 0),
            scale @ _matrix(coordinates, count) @ rays,
            moved,
            None,
            window / size.view(-1, 1, 1),
        )

    half = TILE_SIZE / 2 / random.uniform(0.55, 1.15)
    layers = [
        _Layer(
            tiles,
            _texture_map((width / 2 + zero, horizon), zero, half, half),
            motion([0.0, 0.0, 1.0], end, camera),
            None,
        ),
        plane(
            1,
            [[above, 0.0, 0.0], [0.0, 0.0, above], [0.0, 1.0, 0.0]],
            motion([0.0, 1.0, 0.0], above, camera),
            [-unlimited, unlimited],
        ),
    ]
    for side in (-1.0, 1.0):
        distance = torch.where(random.chance(0.6), random.uniform(0.5, 2.5), unlimited)
        layers.append(
            plane(
                2 + int(side > 0),
                [[0.0, distance, 0.0], [0.0, 0.0, distance], [side, 0.0, 0.0]],
                motion([side, 0.0, 0.0], distance, camera),
                [-above * random.uniform(0.3, 2.0), above],
            )
        )
    depths = torch.stack([1.2 * (end / 1.2) ** random.uniform(0, 1) for _ in OBJECT_SIZES[:6]])
    for depth, size in zip(depths.sort(0, descending=True).values, OBJECT_SIZES, strict=False):
        own = random.chance(0.5) * step
        travel = [camera[0] + 0.5 * own * random.normal(), zero, own * random.normal() - step]
        travel[2] = torch.maximum(travel[2], -0.6 * depth)
        half_width = focal * random.uniform(0.05, 0.6) / depth
        half_height = focal * above * random.uniform(0.1, 0.7) / depth
        present = torch.where(random.chance(PRESENCE), one, 4.0 * (height + width) * one)
        centre = (
            present * random.uniform(0, width),
            horizon + focal * above / depth - half_height,
        )
        outlines = _object_texture(random, textures, tiles, size)
        layers.append(
            _Layer(
                outlines,
                _texture_map(centre, 0.1 * random.normal(), half_width, half_height),
                motion([0.0, 0.0, 1.0], depth, travel),
                None,
            )
        )
    return layers


def _defocused(texture: Tensor, radius: int) -> Tensor:
    """Blur `texture` by a box filter of 2 radius + 1 pixels, twice along each axis."""
    for kernel in ((2 * radius + 1, 1), (1, 2 * radius + 1)) * 2:
        padding = (kernel[0] // 2, kernel[1] // 2)
        texture = F.avg_pool2d(texture, kernel, 1, padding, count_include_pad=False)
    return texture


def _fogged(layers: list[_Layer], random: _Random) -> list[_Layer]:
    """Return the layers in a grey fog that gets denser towards the back."""
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
    """Map pixels, moved by `bend` first, by homographies ([N, 3, 3] float64).

    Returns [N, H, W, 2] float32, `BEHIND` where the plane is not in front of the camera.

    The product is written out by rows, columns and bend, because a matrix product with three
    columns is slow on every device.
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
    if affine:
        return points
    depth = mapped[:, 2, :, :, None]
    return torch.where(depth > NEAREST, points / depth.clamp(min=NEAREST), BEHIND)


def _composite(layers: list[_Layer], sampling: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Return the image [N, 3, H, W] in 0..1 and each object's alpha [N, H, W], back to front."""
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
            padding_mode="zeros" if layer.window is None else "reflection",
            align_corners=False,
        )
        if layer.window is not None:
            low, high = layer.window.to(grid).unbind(-1)
            inside = (grid >= low[:, None, None]) & (grid <= high[:, None, None])
            sample = sample * inside.all(-1)[:, None]
        image = sample[:, :3] + image * (1 - sample[:, 3:])
        alphas.append(sample[:, 3])
    return image, alphas


def _top_layer(alphas: list[Tensor], shape: tuple[int, int, int], device: torch.device) -> Tensor:
    """Return the index of the front-most layer that is more than half opaque, int64 [N, H, W]."""
    index = torch.zeros(shape, dtype=torch.int64, device=device)
    for number, alpha in enumerate(alphas, start=1):
        index[alpha > 0.5] = number
    return index


def _render_layers(layers: list[_Layer], height: int, width: int, shutter: Tensor | None) -> Scenes:
    """Render both frames of layers (back to front) with their flow.

    `shutter` [N] is the share of the motion that happens during an exposure.
    """
    identity = torch.eye(3, dtype=torch.float64)
    device, count = layers[0].texture.device, len(layers[0].texture)
    frames = torch.zeros(2, count, 3, height, width, device=device)
    tops: list[Tensor] = []
    times = (0.0,) if shutter is None else (0.0, -0.5, 0.5)
    for time in times:
        # During the exposure every layer continues its motion by this share.
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
    driving: bool = False,
    effects: bool = True,
    device: torch.device | str = "cpu",
) -> Scenes:
    """Render `count` scenes of one seed.

    `displacement` scales every motion: 1 gives a median of a few pixels with a tail beyond 100,
    0.1 the small motions that FlowNet2-SD is trained on. `driving` scenes are seen by a camera that
    moves forward over a ground plane. Without `effects` there is no motion blur, fog or defocus.
    """
    layers, shutter = compose(
        seed, count, height, width, textures, displacement, driving, effects, device
    )
    return _render_layers(layers, height, width, shutter)


def compose(
    seed: int,
    count: int,
    height: int,
    width: int,
    textures: TextureSource,
    displacement: float = 1.0,
    driving: bool = False,
    effects: bool = True,
    device: torch.device | str = "cpu",
) -> tuple[list[_Layer], Tensor | None]:
    """Draw the layers of :func:`render`, back to front, and the shutter if there is motion blur."""
    random = _Random(seed, count)
    drawn = textures.tiles(count, random.generator)
    tiles = drawn.to(device, non_blocking=True).float() / 255
    if driving:
        layers = _driving(random, textures, tiles, height, width, displacement)
    else:
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

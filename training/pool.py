"""A pool of rendered scenes for reuse, and the augmentation that makes every use different."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from training.generator import Mixture, render
from training.prefetch import draw_ahead
from training.textures import Textures

# Scenes per call. On a GPU the number of calls determines the time, not the number of pixels.
RENDER_BATCH = {"cpu": 8, "cuda": 32}
MARGIN = 64  # pixels by which a scene is higher and wider than its crops


@dataclass(frozen=True)
class Batch:
    """Crops that are ready for a training step.

    `images` float32 [2, B, 3, h, w], BGR in 0..1; `flow` float32 [B, 2, h, w] in pixels;
    `occluded` bool [B, h, w]; `valid` bool [B, h, w], true where the flow is known.
    """

    images: Tensor
    flow: Tensor
    occluded: Tensor
    valid: Tensor


@dataclass(frozen=True)
class Crop:
    """One sample before its colours are changed.

    `frames` uint8 [2, 3, h, w], RGB; `flow` float32 [2, h, w] in pixels, zero where it is not
    known; `occluded` bool [h, w]; `valid` bool [h, w], true where the flow is known.
    """

    frames: Tensor
    flow: Tensor
    occluded: Tensor
    valid: Tensor

    def to(self, device: torch.device) -> Crop:
        return Crop(*(tensor.to(device, non_blocking=True) for tensor in vars(self).values()))


def collate(crops: list[Crop], random: torch.Generator) -> Batch:
    """Make a batch of crops: change colours, and mark pixels that leave the crop as occluded."""
    frames = torch.stack([crop.frames for crop in crops], 1)
    flow = torch.stack([crop.flow for crop in crops])
    occluded = torch.stack([crop.occluded for crop in crops]) | leaves(flow)
    valid = torch.stack([crop.valid for crop in crops])
    return Batch(photometric(frames, random), flow, occluded, valid)


def photometric(frames: Tensor, random: torch.Generator) -> Tensor:
    """Change the colours of uint8 RGB frames [2, B, 3, h, w]; return float32 BGR in 0..1.

    Colours are permuted. Contrast, brightness, colour balance and gamma are drawn once for the pair
    and again, in a smaller range, for each frame; then noise is added.
    """
    device = frames.device
    pairs = frames.shape[1]

    def draw(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(*shape, 1, 1, 1, generator=random)

    def put(values: Tensor) -> Tensor:
        return values.to(device, non_blocking=True)

    images = frames.float() / 255
    order = torch.stack([torch.randperm(3, generator=random) for _ in range(pairs)])
    order = put(order).view(1, pairs, 3, 1, 1).expand_as(images)
    images = images.gather(2, order)
    balance = 0.9 + 0.2 * torch.rand(1, pairs, 3, 1, 1, generator=random)
    gain = balance * draw(0.6, 1.4, 1, pairs) * draw(0.9, 1.1, 2, pairs)
    offset = draw(-0.15, 0.15, 1, pairs) + draw(-0.04, 0.04, 2, pairs)
    gamma = draw(0.75, 1.35, 1, pairs) * draw(0.93, 1.07, 2, pairs)
    images = images.clamp(min=1e-3).pow(put(gamma))
    # Contrast changes around middle grey.
    images = images * put(gain) + put(0.5 - 0.5 * gain + offset)
    sigma = put(draw(0.0, 0.03, 1, pairs))
    seed = int(torch.randint(1 << 30, (1,), generator=random))
    noise_random = torch.Generator(device).manual_seed(seed)
    noise = torch.randn(images.shape, generator=noise_random, device=device)
    return images.addcmul_(noise, sigma).clamp_(0, 1)


def leaves(flow: Tensor) -> Tensor:
    """Return the mask of pixels whose flow [N, 2, h, w] leads out of the image, bool [N, h, w]."""
    height, width = flow.shape[2:]
    x = flow[:, 0] + torch.arange(width, device=flow.device)
    y = flow[:, 1] + torch.arange(height, device=flow.device)[:, None]
    return (x < -0.5) | (y < -0.5) | (x > width - 0.5) | (y > height - 0.5)


class ScenePool:
    """A ring buffer of rendered scenes; every draw crops and mirrors a scene differently.

    The seeds `seed`, `seed + 1`, … are rendered in order, RENDER_BATCH scenes each, so that a pool
    can be restored from the number of batches rendered. Motions are scaled by `displacement`;
    `mixture` gives the shares of batches of other kinds.
    """

    def __init__(
        self,
        textures: Textures,
        capacity: int,
        crop: tuple[int, int],
        displacement: float,
        mixture: Mixture,
        seed: int,
        rendered: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        self.textures, self.crop, self.seed = textures, crop, seed
        self.device = torch.device(device)
        self.scenes = RENDER_BATCH[self.device.type]
        self.displacement, self.mixture = displacement, mixture
        self.size = (crop[0] + MARGIN, crop[1] + MARGIN)
        self.slots = capacity // self.scenes
        height, width = self.size
        scenes = self.slots * self.scenes
        self.frames = torch.zeros(2, scenes, 3, height, width, dtype=torch.uint8, device=device)
        self.flow = torch.zeros(scenes, 2, height, width, device=device)
        self.occluded = torch.zeros(scenes, height, width, dtype=torch.bool, device=device)
        self.rendered = max(0, rendered - self.slots)
        ahead = self.device.type != "cpu"
        self.drawn = (
            draw_ahead(textures, seed, self.rendered, self.scenes, self.size, mixture)
            if ahead
            else None
        )
        self.owed = 0.0
        while self.rendered < max(rendered, self.slots):
            self.render_next()

    def render_next(self) -> None:
        """Render the next batch of scenes in place of the oldest."""
        scale, driving = self.mixture.kind(self.rendered)
        scenes = render(
            self.seed + self.rendered,
            self.scenes,
            *self.size,
            next(self.drawn) if self.drawn else self.textures,
            self.displacement * scale,
            driving,
            device=self.device,
        )
        start = self.rendered % self.slots * self.scenes
        part = slice(start, start + self.scenes)
        self.frames[:, part] = scenes.frames
        self.flow[part] = scenes.flow
        self.occluded[part] = scenes.occluded
        self.rendered += 1

    def draw(self, count: int, reuse: float, random: torch.Generator) -> list[Crop]:
        """Draw crops, after rendering new scenes so that each is used `reuse` times on average."""
        self.owed += count / reuse
        while self.owed >= self.scenes:
            self.render_next()
            self.owed -= self.scenes
        crops = []
        chosen = torch.randint(len(self.flow), (count,), generator=random).tolist()
        corners = torch.randint(MARGIN + 1, (count, 2), generator=random).tolist()
        flips = torch.rand(count, 2, generator=random) < 0.5  # along y and x
        valid = torch.ones(self.crop, dtype=torch.bool, device=self.device)
        for scene, (top, left), flip in zip(chosen, corners, flips.tolist(), strict=True):
            rows, columns = slice(top, top + self.crop[0]), slice(left, left + self.crop[1])
            axes = [axis for axis, flipped in zip((-2, -1), flip, strict=True) if flipped]
            signs = torch.tensor([-1.0 if flipped else 1.0 for flipped in reversed(flip)])
            flow = self.flow[scene, :, rows, columns].flip(axes)
            crops.append(
                Crop(
                    self.frames[:, scene, :, rows, columns].flip(axes),
                    flow * signs.to(self.device, non_blocking=True).view(2, 1, 1),
                    self.occluded[scene, rows, columns].flip(axes),
                    valid,
                )
            )
        return crops

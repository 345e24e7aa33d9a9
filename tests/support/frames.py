"""Frames whose flow the closed-form model of the tests computes, and that flow."""

from pathlib import Path

import numpy as np
from PIL import Image

from tests.support.gateway_stack import picture

WIDTH, HEIGHT = 80, 56


def closed_form(first: Image.Image, second: Image.Image) -> np.ndarray:
    return (np.asarray(second, np.float32) - np.asarray(first, np.float32))[..., :2] / 8


def write_images(*paths: Path) -> list[Image.Image]:
    images = [picture(seed, WIDTH, HEIGHT) for seed in range(len(paths))]
    for path, image in zip(paths, images, strict=True):
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
    return images


def constant(u: float, v: float) -> np.ndarray:
    return np.broadcast_to(np.array([u, v], np.float32), (HEIGHT, WIDTH, 2)).copy()

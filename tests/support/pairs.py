"""Pairs of images with smooth texture, and their flow by ONNX Runtime."""

from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime
from PIL import Image

Images = npt.NDArray[np.uint8]


def pair(height: int, width: int, seed: int = 0, batch: int = 1) -> tuple[Images, Images]:
    """Draw a smooth random image, and return it with a shifted copy."""
    random = np.random.default_rng(seed)
    small = random.integers(0, 256, (batch, height // 8 + 3, width // 8 + 3, 3), np.uint8)
    large = np.stack(
        [
            np.asarray(Image.fromarray(image).resize((width + 8, height + 8), Image.BICUBIC))
            for image in small
        ]
    )
    return large[:, 2:-6, 5:-3].copy(), large[:, 4:-4, 2:-6].copy()


def expected(session: onnxruntime.InferenceSession, images: tuple[Images, Images]) -> Any:
    """Return the flow that ONNX Runtime computes."""
    return session.run(None, {"image1": images[0], "image2": images[1]})[0]


def end_point_error(flow: Any, other: Any) -> Any:
    """Return the distance of two flows at each pixel."""
    return np.linalg.norm(flow - other, axis=-1)

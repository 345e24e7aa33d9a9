"""The golden pair: two images with their flow, which an engine has to reproduce before it serves.

``golden.npz`` beside a model holds ``image1`` and ``image2`` (uint8 ``[1, H, W, 3]``) and ``flow``
(float32 ``[1, H, W, 2]``).
"""

from pathlib import Path

import numpy as np
import numpy.typing as npt

from flownet2.contract import FLOW_OUTPUT, GRID, IMAGE_INPUTS

SHIFT, ZOOM = (1.5, -1.0), 1.01  # of the second image: pixels, and factor about the centre


def write_golden(model: Path, file: Path) -> None:
    """Write the golden pair with its flow, computed in float32 on the CPU.

    Args:
        model: the ONNX file of the network.
        file: the ``golden.npz`` to write.
    """
    images = golden_images()
    flow = run_on_cpu(model, *images)
    with file.open("wb") as opened:
        np.savez(opened, flow=flow, **dict(zip(IMAGE_INPUTS, images, strict=True)))


def golden_images() -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    """Draw a texture, and the same texture shifted and slightly enlarged.

    The images have the gateway's default size, for which every engine compiles a network anyway.
    """
    height, width = GRID
    y, x = np.mgrid[:height, :width].astype(np.float32)
    (right, down), random = SHIFT, np.random.default_rng(0)
    moved_x = (x - width / 2 - right) / ZOOM + width / 2
    moved_y = (y - height / 2 - down) / ZOOM + height / 2
    images = np.zeros((2, *GRID, 3))
    for cell in (64, 32, 16, 8, 4):
        noise = random.standard_normal((height // cell + 4, width // cell + 4, 3))
        images[0] += _interpolate(noise, x / cell + 1, y / cell + 1)
        images[1] += _interpolate(noise, moved_x / cell + 1, moved_y / cell + 1)
    first, second = (np.tanh(images * 0.6) * 127 + 128).astype(np.uint8)
    return first[None], second[None]


def _interpolate(
    grid: npt.NDArray[np.float64], x: npt.NDArray[np.float32], y: npt.NDArray[np.float32]
) -> npt.NDArray[np.float64]:
    """Sample ``[H, W, C]`` at coordinates, bilinearly."""
    column, row = x.astype(int), y.astype(int)
    right, down = (x - column)[..., None], (y - row)[..., None]
    upper = grid[row, column] * (1 - right) + grid[row, column + 1] * right
    lower = grid[row + 1, column] * (1 - right) + grid[row + 1, column + 1] * right
    sampled: npt.NDArray[np.float64] = upper * (1 - down) + lower * down
    return sampled


def run_on_cpu(
    model: Path, image1: npt.NDArray[np.uint8], image2: npt.NDArray[np.uint8]
) -> npt.NDArray[np.float32]:
    """Run a network in float32 with ONNX Runtime or, if that is not installed, with OpenVINO."""
    try:
        import onnxruntime  # noqa: PLC0415
    except ModuleNotFoundError:  # `make serve` on a machine without a GPU
        from export.served.openvino_engine import OpenVinoEngine  # noqa: PLC0415

        return OpenVinoEngine(model, "fp32")(image1, image2)
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    flow: npt.NDArray[np.float32] = session.run(
        [FLOW_OUTPUT], dict(zip(IMAGE_INPUTS, (image1, image2), strict=True))
    )[0]
    return flow

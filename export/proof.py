"""Check a wrapped network before it is served, and measure its memory.

Exporters often mark sizes as dynamic although they are constants in the graph. Such a network
computes wrong flow at every other size, without an error.
"""

import functools
import importlib.util
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnxruntime

from export.golden import golden_images, run_on_cpu
from export.wrap import WrapError
from flownet2.contract import FLOW_OUTPUT, IMAGE_INPUTS, MINIMUM_SIDE, SIZE_MULTIPLE

SHIFT = (8, -8)  # pixels to the right and down; networks match features of an eighth of the size
SIZES = ((192, 256), (256, 192), (203, 150), (320, 384))
CENTRE = 64  # side of the region whose flow is compared
LARGEST_DISTANCE, LARGEST_SHARE = 0.25, 0.1  # pixels, and share of the flow's length
BATCH_DISTANCE = 0.01

MEMORY_LIMIT = 2**32
MEASURED_SIDES = (256, 512, 768)

Array = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Memory:
    """Bytes that a network needs for images of `p` pixels: ``fixed + linear p + square p²``."""

    fixed: float
    linear: float
    square: float

    def max_pixels(self) -> int:
        """Return the number of pixels that :data:`MEMORY_LIMIT` allows, in tiles of 64x64."""
        pixels = np.arange(1, 2**14) * SIZE_MULTIPLE**2
        fitting = self.fixed + self.linear * pixels + self.square * pixels**2 <= MEMORY_LIMIT
        return int(pixels[fitting].max(initial=0))


def check(file: Path, any_size: bool) -> tuple[bool, list[str]]:
    """Run a wrapped network at several sizes, in a batch and at the smallest size.

    Args:
        file: the wrapped network.
        any_size: whether the network computes at the images' size, so that the flow of a shifted
            texture must be the same at all sizes.

    Returns:
        True if the network takes batches; and warnings.

    Raises:
        WrapError: its flow is not finite, has another shape, or depends on the images' size.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # hide warnings: errors are raised
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    sizes = (*SIZES, (MINIMUM_SIDE, MINIMUM_SIDE))
    flows = {size: _run(session, *_shifted(*size)) for size in sizes}
    centres = [_centre(flows[size]) for size in SIZES]
    length = float(np.linalg.norm(centres[0], axis=-1).mean())
    if any_size:
        for size, centre in zip(SIZES[1:], centres[1:], strict=True):
            distance = float(np.linalg.norm(centre - centres[0], axis=-1).mean())
            if not distance <= LARGEST_DISTANCE + LARGEST_SHARE * length:
                raise WrapError(
                    f"the flow of one pair differs by {distance:.2f} px between images of "
                    f"{_size(SIZES[0])} and {_size(size)}: the graph claims to take any size, but "
                    "computes correct flow at only one, or it is not trained. Give that size as "
                    "--size HEIGHTxWIDTH: images are then resized to it"
                )
    warnings = []
    distance = float(np.linalg.norm(centres[0] - np.array(SHIFT, np.float32), axis=-1).mean())
    if distance > 1:
        warnings.append(
            f"the flow of a texture shifted by {SHIFT} px is off by {distance:.1f} px: check the "
            "range, mean and channel order of the images"
        )
    pairs = [np.concatenate(pair) for pair in zip(_shifted(*SIZES[0]), _turned(), strict=True)]
    try:
        batch = _run(session, *pairs)
        singles = np.concatenate([flows[SIZES[0]], _run(session, *_turned())])
        batches = bool(np.abs(batch - singles).max() <= BATCH_DISTANCE * max(1, length))
    except WrapError:
        batches = False
    if not batches:
        warnings.append("it takes no batch of two pairs, so batches run pair by pair")
    return batches, warnings


def _run(
    session: onnxruntime.InferenceSession,
    image1: npt.NDArray[np.uint8],
    image2: npt.NDArray[np.uint8],
) -> Array:
    size = _size(image1.shape[1:3])
    try:
        images = dict(zip(IMAGE_INPUTS, (image1, image2), strict=True))
        flow: Array = session.run([FLOW_OUTPUT], images)[0]
    except Exception as error:  # ONNX Runtime's have no common base
        reason = " ".join(str(error).split())[:200]
        raise WrapError(
            f"the network fails for {len(image1)} pairs of {size}: {reason}. If it needs larger "
            "images or other multiples, name them with --least and --multiple"
        ) from error
    if flow.shape != (*image1.shape[:3], 2):
        raise WrapError(f"the flow of images of {size} has the shape {flow.shape}")
    if not np.isfinite(flow).all():
        raise WrapError(f"the flow of images of {size} is not finite")
    return flow


@functools.cache
def _texture() -> npt.NDArray[np.uint8]:
    return golden_images()[0]


def _shifted(height: int, width: int) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    """Cut a pair from a texture, around its centre; the second image is shifted."""
    texture = _texture()
    top, left = (
        (side - size) // 2 for side, size in zip(texture.shape[1:], (height, width), strict=False)
    )
    right, down = SHIFT
    return (
        texture[:, top : top + height, left : left + width],
        texture[:, top - down : top - down + height, left - right : left - right + width],
    )


def _turned() -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    """Return the pair of the first size upside down, as the second pair of a batch."""
    first, second = _shifted(*SIZES[0])
    return first[:, ::-1].copy(), second[:, ::-1].copy()


def _centre(flow: Array) -> Array:
    top, left = ((side - CENTRE) // 2 for side in flow.shape[1:3])
    return flow[0, top : top + CENTRE, left : left + CENTRE]


def _size(shape: tuple[int, ...]) -> str:
    return f"{shape[1]}x{shape[0]}"


def measure_memory(file: Path) -> Memory:
    """Measure the memory of a network at three sizes, each in a separate process."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=1) as executor:
        peaks = list(executor.map(_peak_memory, [file] * 3, MEASURED_SIDES))
    pixels = [side * side for side in MEASURED_SIDES]
    slopes = [(peaks[i + 1] - peaks[i]) / (pixels[i + 1] - pixels[i]) for i in (0, 1)]
    square = max(0.0, (slopes[1] - slopes[0]) / (pixels[2] - pixels[0]))
    linear = max(0.0, slopes[0] - square * (pixels[0] + pixels[1]))
    fixed = max(m - linear * p - square * p * p for m, p in zip(peaks, pixels, strict=True))
    return Memory(max(0.0, fixed), linear, square)


def _peak_memory(file: Path, side: int) -> int:
    """Return the largest increase of this process's memory during an inference, in bytes."""
    image = np.zeros((1, side, side, 3), np.uint8)
    if importlib.util.find_spec("openvino"):  # the engine on CPUs
        from export.served.openvino_engine import OpenVinoEngine  # noqa: PLC0415

        before = _high_water_mark()
        OpenVinoEngine(file, "fp32")(image, image)
    else:
        before = _high_water_mark()
        run_on_cpu(file, image, image)
    return _high_water_mark() - before


def _high_water_mark() -> int:
    # Not getrusage, whose maximum includes that of the parent process.
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024

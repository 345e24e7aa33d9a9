"""The engines that can run a model, and the check that an engine has to pass before it serves."""

import functools
import os
import signal
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol
from zipfile import BadZipFile

import numpy as np
import numpy.typing as npt

Images = npt.NDArray[np.uint8]
Flow = npt.NDArray[np.float32]

# Pixels by which flow may differ from the golden pair's on average.
LIMITS = {"fp32": 0.001, "fp16": 0.05, "bf16": 0.05}
# These limits apply up to this mean length of the flow. For longer flow, such as an untrained
# network's, they grow in proportion.
GOLDEN_LENGTH = 2.5

PROVIDER_VARIABLE = "FLOWNET2_ONNXRUNTIME_PROVIDER"
"""Environment variable for tests: provider of ONNX Runtime to use in place of CUDA."""


class EngineError(Exception):
    """Raised when an engine cannot serve the model; the message says why."""


class Engine(Protocol):
    """A network, ready to run.

    Attributes:
        name: name and version of the software.
        device: "cpu", "cuda:0", …
        precision: precision of the wide convolutions, "fp32", "fp16" or "bf16".
        first_runs: number of requests of one shape after which later ones run in the same way.
    """

    name: str
    device: str
    precision: str
    first_runs: int

    def __call__(self, image1: Images, image2: Images) -> Flow:
        """Compute the flow from ``image1`` to ``image2``.

        Args:
            image1, image2: ``[N, H, W, 3]``, RGB.

        Returns:
            ``[N, H, W, 2]`` in pixels.
        """


@dataclass(frozen=True)
class Golden:
    """A pair of images with the flow that ONNX Runtime computes on the CPU in float32."""

    image1: Images
    image2: Images
    flow: Flow

    @classmethod
    def read(cls, file: Path) -> "Golden":
        """Read the ``golden.npz`` that the exporter wrote beside a model.

        Raises:
            EngineError: it cannot be read.
        """
        try:
            with file.open("rb") as opened, np.load(opened) as arrays:
                return cls(arrays["image1"], arrays["image2"], arrays["flow"])
        except (OSError, EOFError, ValueError, KeyError, BadZipFile) as error:
            raise EngineError(
                f"the golden pair {file} cannot be read: {error}. Export the model again"
            ) from error

    def difference(self, engine: Engine) -> float:
        """Return the mean distance of an engine's flow from the golden flow, in pixels.

        It is the largest of several runs, which include every way in which the engine runs this
        shape.

        Raises:
            EngineError: the distance is above the limit of the engine's precision.
        """
        distances = [
            np.linalg.norm(engine(self.image1, self.image2) - self.flow, axis=-1).mean()
            for _ in range(engine.first_runs + 1)
        ]
        difference = float(np.max(distances))  # also rejects NaN
        length = float(np.linalg.norm(self.flow, axis=-1).mean())
        limit = LIMITS[engine.precision] * max(1, length / GOLDEN_LENGTH)
        if not difference <= limit:
            raise EngineError(
                f"its flow of the golden pair differs by {difference:.4f} px on average, more than "
                f"{limit:.4f} px"
            )
        return difference


def feature_bytes(metadata: Mapping[str, str], pixels: int, usual: float) -> float:
    """Estimate the bytes of a network's features for an image.

    Args:
        metadata: metadata of the ONNX file. For a network that is not FlowNet's, ``memory`` holds
            the measured bytes per pixel, and per pixel squared (all-pairs correlations).
        pixels: number of pixels of the image.
        usual: bytes per pixel of FlowNet's networks.
    """
    linear, square = map(float, metadata.get("memory", f"{usual} 0").split())
    return linear * pixels + square * pixels**2


Candidate = tuple[str, Callable[[], Engine]]
"""An engine's description and its constructor."""


def candidates(folder: Path, gpu: int | None, golden: Golden) -> Iterator[Candidate]:
    """Yield the engines that may run a model, by preference.

    A model without a ``model_fp16.onnx`` runs in float32 only.

    Args:
        folder: the model's version folder.
        gpu: the number of the GPU to run on, None for the CPU.
        golden: the model's golden pair.
    """
    provider = os.environ.get(PROVIDER_VARIABLE)
    if gpu is not None or provider:

        def create_on_gpu() -> Engine:
            from .onnxruntime_engine import OnnxRuntimeEngine  # noqa: PLC0415

            return OnnxRuntimeEngine(folder, gpu or 0, *filter(None, [provider]))

        def create_checked() -> Engine:
            check_for_crash(lambda: golden.difference(create_on_gpu()))
            return create_on_gpu()

        yield "ONNX Runtime", create_checked
    from .openvino_engine import OpenVinoEngine, precisions  # noqa: PLC0415

    reduced = (folder / "model_fp16.onnx").is_file()
    for precision in precisions() if reduced else ["fp32"]:
        create = functools.partial(OpenVinoEngine, folder / "model.onnx", precision)
        yield f"OpenVINO in {precision}", create


def check_for_crash(run: Callable[[], object]) -> None:
    """Run a function in a separate process, so that a crash does not end this one.

    An incompatible driver or CUDA library may crash the process, and no other engine could be
    tried. An exception of the function is ignored, because it occurs again in this process.

    Raises:
        EngineError: the process crashed.
    """
    process = os.fork()
    if process == 0:
        try:
            run()
        finally:
            os._exit(0)
    _, status = os.waitpid(process, 0)
    if os.WIFSIGNALED(status):
        raise EngineError(f"it crashes ({signal.strsignal(os.WTERMSIG(status))})")


def first_that_is_right(
    engines: Iterable[Candidate],
    golden: Golden,
    warn: Callable[[str], None],
) -> tuple[Engine, float]:
    """Return the first engine that reproduces the golden pair, and by how many pixels it differs.

    Args:
        engines: the engines, by preference.
        warn: receives a line for each engine that fails.

    Raises:
        EngineError: all of them fail.
    """
    for description, create in engines:
        try:
            engine = create()
            return engine, golden.difference(engine)
        except Exception as error:  # ONNX Runtime's errors have no common base
            warn(f"{description} is not used: {error}")
    raise EngineError("no engine can run this model; the lines above say why")

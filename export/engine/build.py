"""Builds an engine by TensorRT; its precision is that of the file's types, half for the blocks."""

import contextlib
import ctypes
import importlib
import logging
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from export.engine.gpu import EngineError, find_gpu
from export.engine.plans import plan_path, use_plan, write_plan
from export.repository import HALF_MODEL, replacing
from flownet2.contract import BATCH_EDGE, GRID, IMAGE_INPUTS, MAX_BATCH_SIZE, MINIMUM_SIDE

PLUGIN = "libflownet2_tensorrt.so"  # found by the loader in the image of Triton
CORRELATION = ("Correlation", "1", "flownet2")  # name, version and namespace of the plugin

SINGLE_EDGE = 2048
LEAST = (1, MINIMUM_SIDE, MINIMUM_SIDE)
# Smallest, best and largest (batch, height, width): batches of small images, which are all that
# Triton makes (plugins/triton_batching.cpp), and single images up to 2048x2048, which 1080p fits
# either way. A profile bounds edges, and TensorRT plans memory for its largest size.
# Triton takes the profile whose best size is nearest, and compares each axis with the one before
# it; these two lie so far apart that small images go to the first even so. Others fit one alone.
PROFILES = (
    (LEAST, (MAX_BATCH_SIZE // 2, *GRID), (MAX_BATCH_SIZE, BATCH_EDGE, BATCH_EDGE)),
    (LEAST, (1, 1080, 1920), (1, SINGLE_EDGE, SINGLE_EDGE)),
)

logger = logging.getLogger(__name__)


def build_engine(repository: Path, name: str) -> Path:
    """Make ``<repository>/<name>/1/model.plan`` an engine that fits; build it if need be.

    Returns:
        The plan, to which ``model.plan`` is a link.

    Raises:
        EngineError
    """
    folder = repository / name / "1"
    model = folder / HALF_MODEL
    if not model.is_file():
        raise EngineError(f"{model} is missing: export the model into this repository")
    gpu = find_gpu()
    trt = import_tensorrt()
    plugin = load_plugin(trt, PLUGIN)
    log = trt_logger(trt)
    plan = plan_path(folder, gpu, trt.__version__, (plugin, model, Path(__file__)))
    if plan.is_file():
        if start(trt.Runtime, log).deserialize_cuda_engine(plan.read_bytes()):
            logger.info("%s fits %s and TensorRT %s", plan, gpu.name, trt.__version__)
            use_plan(plan)
            return plan
        logger.warning("%s does not load and is built anew", plan)
    if os.environ.get("BUILD_ENGINES") == "0":  # where a job builds them for all
        raise EngineError(f"no engine in {folder} fits, and BUILD_ENGINES=0 lets none be built")
    logger.info("building %s for %s with TensorRT %s", plan, gpu.name, trt.__version__)
    started = time.monotonic()
    builder = start(trt.Builder, log)
    network = parse(trt, builder, model, log)
    check_plugin_is_used(network)
    config = configure(trt, builder)
    with timings_kept(config, folder / "timing.cache"):
        serialized = builder.build_serialized_network(network, config)
    if serialized is None:
        raise EngineError(f"TensorRT did not build the engine: {log.cause}")
    write_plan(plan, serialized)
    use_plan(plan)
    logger.info("built %s in %.0f s", plan, time.monotonic() - started)
    return plan


def import_tensorrt() -> ModuleType:
    """TensorRT's Python package.

    Raises:
        EngineError: it cannot be imported.
    """
    try:
        return importlib.import_module("tensorrt")
    except (ImportError, OSError) as error:
        raise EngineError(
            f"TensorRT's Python package does not load: {error}. Install `tensorrt` in the version "
            "that Triton brings"
        ) from None


def load_plugin(trt: Any, library: str) -> Path:
    """Load the plugin library, which registers the plugin; returns its file.

    Raises:
        EngineError: it does not load, or registers another plugin.
    """
    try:
        ctypes.CDLL(library)
    except OSError as error:
        raise EngineError(f"the plugin {library} does not load: {error}") from None
    if trt.get_plugin_registry().get_creator(*CORRELATION) is None:
        raise EngineError(f"{library} registers no plugin {CORRELATION[0]}: build plugins/ anew")
    # The loader may have found it anywhere; what is mapped into this process says where.
    for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines():
        file = Path(line.split(maxsplit=5)[-1])
        if file.name == Path(library).resolve().name:
            return file
    raise EngineError(f"{library} is not among the libraries of this process")


def start(part: Any, log: Any) -> Any:
    """TensorRT's builder or runtime.

    Raises:
        EngineError: it does not take this GPU and driver.
    """
    try:
        return part(log)
    except TypeError:  # what a null pointer from C++ becomes
        raise EngineError(f"TensorRT does not start: {log.cause}") from None


def parse(trt: Any, builder: Any, model: Path, log: Any) -> Any:
    """The network of an ONNX file, its layers' types those of the file.

    Raises:
        EngineError: it is no ONNX file, or TensorRT's parser does not take it.
    """
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(model)):
        reason = " ".join(str(parser.get_error(0)).split()) if parser.num_errors else log.cause
        raise EngineError(f"TensorRT cannot read {model}: {reason}. Export the model again")
    return network


def check_plugin_is_used(network: Any) -> None:
    """Make sure that the correlation did not become its function's many standard layers.

    Raises:
        EngineError: it did.
    """
    names = (network.get_layer(i).name for i in range(network.num_layers))
    if any(name.startswith(f"{CORRELATION[0]}/") for name in names):  # as export.graph names them
        raise EngineError(
            "TensorRT took the correlation's function body, not the plugin. Export the model again"
        )


def configure(trt: Any, builder: Any) -> Any:
    """Settings of the build: profiles, and progress in the log."""
    config = builder.create_builder_config()
    for sizes in PROFILES:
        profile = builder.create_optimization_profile()
        for image in IMAGE_INPUTS:
            profile.set_shape(image, *((*size, 3) for size in sizes))
        config.add_optimization_profile(profile)
    config.progress_monitor = progress_monitor(trt)
    return config


@contextlib.contextmanager
def timings_kept(config: Any, file: Path) -> Iterator[None]:
    """Start from the measurements of earlier builds, if they are of this GPU and TensorRT.

    What is measured meanwhile is kept, of a build that fails too: the next one is shorter then.
    """
    measured = file.read_bytes() if file.is_file() else b""
    if not config.set_timing_cache(config.create_timing_cache(measured), ignore_mismatch=False):
        logger.info("%s is of another GPU or TensorRT: measuring anew", file)
        config.set_timing_cache(config.create_timing_cache(b""), ignore_mismatch=False)
    try:
        yield
    finally:
        try:
            with replacing(file) as new:
                new.write_bytes(config.get_timing_cache().serialize())
        except OSError as error:
            logger.warning("the next build measures anew: %s", error)


def trt_logger(trt: Any) -> Any:
    """A logger for TensorRT that passes messages on to ours and keeps the first error."""

    class Forwarding(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.cause = "it gives no reason"
            self.failed = False

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.Severity.INTERNAL_ERROR, trt.ILogger.Severity.ERROR):
                if not self.failed:  # those that follow are consequences
                    self.cause, self.failed = " ".join(message.split()), True
                logger.error("TensorRT: %s", message)
            elif severity == trt.ILogger.Severity.WARNING:
                logger.warning("TensorRT: %s", message)

    return Forwarding()


def progress_monitor(trt: Any, interval: float = 10.0) -> Any:
    """Logs how far the build is, at most every `interval` seconds."""

    class Progress(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.lock = threading.Lock()  # called from several threads
            self.phases: dict[str, list[int]] = {}  # step and number of steps, outermost first
            self.started = self.said = time.monotonic()

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            with self.lock:
                self.phases[phase] = [0, steps]

        def step_complete(self, phase: str, step: int) -> bool:
            with self.lock:
                self.phases[phase][0] = step + 1
                now = time.monotonic()
                if now - self.said >= interval:
                    self.said = now
                    where = " > ".join(f"{p} {n}/{of}" for p, (n, of) in self.phases.items())
                    logger.info("%.0f s: %s", now - self.started, where)
            return True  # go on

        def phase_finish(self, phase: str) -> None:
            with self.lock:
                self.phases.pop(phase, None)

    return Progress()

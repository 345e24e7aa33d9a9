"""Builds the TensorRT engine of a model; its precision is that of the types in the ONNX file."""

import contextlib
import ctypes
import importlib
import logging
import math
import os
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import onnx

from export.engine import gathers
from export.engine.check import check_plan
from export.engine.gpu import EngineError, find_gpu
from export.engine.plans import plan_path, use_plan, write_plan
from export.repository import DESCRIPTION, HALF_MODEL, MODEL, replacing
from flownet2.contract import (
    BATCH_EDGE,
    GRID,
    IMAGE_INPUTS,
    MAX_BATCH_SIZE,
    MINIMUM_SIDE,
    SIZE_MULTIPLE,
)

PLUGIN = "libflownet2_tensorrt.so"  # the loader finds it in Triton's image
CORRELATION = ("Correlation", "1", "flownet2")  # name, version and namespace of the plugin

SINGLE_EDGE = 2048
LEAST = (1, MINIMUM_SIDE, MINIMUM_SIDE)
# Smallest, best and largest (batch, height, width). The first profile is for batches of small
# images, the only ones that plugins/triton_batching.cpp allows, the second for single images up to
# 2048x2048, such as 1080p upright. A profile limits the sides, and TensorRT plans memory for its
# largest size. Triton should choose the profile whose best size is nearest, but compares each axis
# with the previous axis. The two profiles are far enough apart that small images still get the
# first.
PROFILES = (
    (LEAST, (MAX_BATCH_SIZE // 2, *GRID), (MAX_BATCH_SIZE, BATCH_EDGE, BATCH_EDGE)),
    (LEAST, (1, 1080, 1920), (1, SINGLE_EDGE, SINGLE_EDGE)),
)

logger = logging.getLogger(__name__)


def build_engine(repository: Path, name: str) -> Path:
    """Link ``<repository>/<name>/1/model.plan`` to an engine for this GPU; build it if needed.

    The link is made only after the engine has reproduced the golden pair.

    Returns:
        The plan that ``model.plan`` links to.

    Raises:
        EngineError: there is no GPU or TensorRT, the build fails, or the engine's flow is wrong.
    """
    folder = repository / name / "1"
    # Networks that run in float32 only have no other file.
    model = folder / (HALF_MODEL if (folder / HALF_MODEL).is_file() else MODEL)
    if not model.is_file():
        raise EngineError(f"{model} is missing: export the model into this repository")
    gpu = find_gpu()
    trt = import_tensorrt()
    plugin = load_plugin(trt, PLUGIN)
    log = trt_logger(trt)
    built_from = (plugin, model, Path(__file__), Path(gathers.__file__))
    plan = plan_path(folder, gpu, trt.__version__, built_from)
    runtime = start(trt.Runtime, log)
    engine = runtime.deserialize_cuda_engine(plan.read_bytes()) if plan.is_file() else None
    if engine:
        logger.info("%s fits %s and TensorRT %s", plan, gpu.name, trt.__version__)
    else:
        if plan.is_file():
            logger.warning("%s does not load and is built again", plan)
        if os.environ.get("BUILD_ENGINES") == "0":  # a job builds the engines for all pods
            raise EngineError(f"no engine in {folder} fits, and BUILD_ENGINES=0 forbids a build")
        build_plan(trt, log, model, plan)
        engine = runtime.deserialize_cuda_engine(plan.read_bytes())
        if not engine:
            raise EngineError(f"TensorRT does not load the engine that it has built: {log.cause}")
    difference = check_plan(engine, folder)
    logger.info("%s: its flow of the golden pair differs by %.4f px", plan.name, difference)
    use_plan(plan)
    return plan


def build_plan(trt: Any, log: Any, model: Path, plan: Path) -> None:
    """Build the engine of an ONNX file.

    Raises:
        EngineError: TensorRT cannot build the engine, or it cannot be written.
    """
    logger.info("building %s with TensorRT %s", plan, trt.__version__)
    started = time.monotonic()
    builder = start(trt.Builder, log)
    network = parse(trt, builder, model, log)
    check_plugin_is_used(network)
    config = configure(trt, builder, largest_edge(plan.parent))
    with timings_kept(config, plan.with_name("timing.cache")):
        serialized = builder.build_serialized_network(network, config)
    if serialized is None:
        raise EngineError(f"TensorRT did not build the engine: {log.cause}")
    write_plan(plan, serialized)
    logger.info("built %s in %.0f s", plan, time.monotonic() - started)


def import_tensorrt() -> ModuleType:
    """Import TensorRT's Python package.

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
    """Load the plugin library, which registers the plugin, and return its file.

    Raises:
        EngineError: it does not load, or registers another plugin.
    """
    try:
        ctypes.CDLL(library)
    except OSError as error:
        raise EngineError(f"the plugin {library} does not load: {error}") from None
    if trt.get_plugin_registry().get_creator(*CORRELATION) is None:
        raise EngineError(f"{library} registers no plugin {CORRELATION[0]}: build plugins/ again")
    # The loader searches many folders; the list of mapped files shows which file it loaded.
    for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines():
        file = Path(line.split(maxsplit=5)[-1])
        if file.name == Path(library).resolve().name:
            return file
    raise EngineError(f"{library} is not among the libraries of this process")


def start(part: Any, log: Any) -> Any:
    """Create TensorRT's builder or runtime.

    Raises:
        EngineError: TensorRT does not support this GPU or driver.
    """
    try:
        return part(log)
    except TypeError:  # raised for a null pointer from C++
        raise EngineError(f"TensorRT does not start: {log.cause}") from None


def parse(trt: Any, builder: Any, model: Path, log: Any) -> Any:
    """Parse an ONNX file into a network whose layers have the types of the file.

    Warps become gathers, see :mod:`export.engine.gathers`.

    Raises:
        EngineError: it is not an ONNX file, or TensorRT does not support it.
    """
    try:
        proto = onnx.load(model)
    except Exception as error:  # protobuf's has another base in each implementation
        raise EngineError(f"{model} is not an ONNX file. Export the model again") from error
    proto = gathers.warp_by_gathers(proto)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    if not parser.parse(proto.SerializeToString()):
        reason = " ".join(str(parser.get_error(0)).split()) if parser.num_errors else log.cause
        raise EngineError(f"TensorRT cannot read {model}: {reason}. Export the model again")
    return network


def check_plugin_is_used(network: Any) -> None:
    """Raise an error unless TensorRT uses the plugin, not the correlation's function body.

    Raises:
        EngineError: it uses the body.
    """
    names = (network.get_layer(i).name for i in range(network.num_layers))
    if any(name.startswith(f"{CORRELATION[0]}/") for name in names):  # the names in export.graph
        raise EngineError(
            "TensorRT uses the correlation's function body, not the plugin. Export the model again"
        )


def largest_edge(folder: Path) -> int:
    """Return the largest edge of a single image: the model's pixel limit may lower it."""
    description = folder / DESCRIPTION
    text = description.read_text(encoding="utf-8") if description.is_file() else ""
    limit = re.search(r'"max_pixels" value { string_value: "(\d+)" }', text)
    edge = math.isqrt(int(limit[1])) // SIZE_MULTIPLE * SIZE_MULTIPLE if limit else SINGLE_EDGE
    return min(edge, SINGLE_EDGE)


def configure(trt: Any, builder: Any, edge: int = SINGLE_EDGE) -> Any:
    """Create the builder configuration: optimisation profiles and a progress monitor."""
    config = builder.create_builder_config()
    for sizes in PROFILES:
        profile = builder.create_optimization_profile()
        for image in IMAGE_INPUTS:
            profile.set_shape(image, *((n, min(h, edge), min(w, edge), 3) for n, h, w in sizes))
        config.add_optimization_profile(profile)
    config.progress_monitor = progress_monitor(trt)
    return config


@contextlib.contextmanager
def timings_kept(config: Any, file: Path) -> Iterator[None]:
    """Reuse the timings of earlier builds on this GPU and TensorRT, and keep new ones.

    Timings of a failed build are kept too, so that the next build is shorter.
    """
    measured = file.read_bytes() if file.is_file() else b""
    if not config.set_timing_cache(config.create_timing_cache(measured), ignore_mismatch=False):
        logger.info("%s is from another GPU or TensorRT: measuring again", file)
        config.set_timing_cache(config.create_timing_cache(b""), ignore_mismatch=False)
    try:
        yield
    finally:
        try:
            with replacing(file) as new:
                new.write_bytes(config.get_timing_cache().serialize())
        except OSError as error:
            logger.warning("the next build measures again: %s", error)


def trt_logger(trt: Any) -> Any:
    """Create a logger for TensorRT that forwards messages to ours and keeps the first error."""

    class Forwarding(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.cause = "it gives no reason"
            self.failed = False

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.Severity.INTERNAL_ERROR, trt.ILogger.Severity.ERROR):
                if not self.failed:  # later errors are consequences
                    self.cause, self.failed = " ".join(message.split()), True
                logger.error("TensorRT: %s", message)
            elif severity == trt.ILogger.Severity.WARNING:
                logger.warning("TensorRT: %s", message)

    return Forwarding()


def progress_monitor(trt: Any, interval: float = 10.0) -> Any:
    """Create a monitor that logs the progress of the build, at most every `interval` seconds."""

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
            return True  # True: continue the build

        def phase_finish(self, phase: str) -> None:
            with self.lock:
                self.phases.pop(phase, None)

    return Progress()

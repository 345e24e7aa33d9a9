"""The TensorRT engine of an exported model, built on the GPU that will serve it.

An engine fits one GPU type, one TensorRT version, one plugin and one ONNX file. Its plan is named
by a hash of all that it was built from, so that plans for several GPU types may lie side by side;
``model.plan`` is a link to the one in use.

Precision is that of the ONNX file's types (``--precision`` of the export); float32 convolutions
may use TF32, TensorRT's default.
"""

import argparse
import contextlib
import ctypes
import errno
import hashlib
import importlib
import json
import logging
import math
import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import onnx
from google.protobuf.message import DecodeError

from export.repository import HALF_MODEL, replacing
from flownet2.contract import GRID, IMAGE_INPUTS, MAX_BATCH_SIZE

PLUGIN = "libflownet2_tensorrt.so"  # found by the loader in the image of Triton
PLUGIN_NAME, PLUGIN_VERSION, PLUGIN_NAMESPACE = "Correlation", "1", "flownet2"
SUPPORTED_MAJORS = (10, 11)  # IPluginV3 came with 10

SMALLEST_EDGE = 16
# The gateway takes up to 4 megapixels at native size, upright images as well as wide ones.
LARGEST_EDGE = 4096
# Largest height and width in a batch: at least what plugins/triton_batching.cpp lets Triton put in
# one, at most what keeps the 82 channels of FlowNet2's fusion below 2^31 values.
SMALLEST_BATCH_EDGE, LARGEST_BATCH_EDGE = 576, 1792
BATCH_OPTIMUM, SINGLE_OPTIMUM = (640, 640), (720, 1280)  # height and width
# Activation memory for each pixel of the batch, in float16 and float32. TensorRT-RTX 1.7 plans 542
# and 1041 bytes for FlowNet2; in float32, 478 for FlowNet2-css and 210 for FlowNet2-c.
FULL_BYTES_PER_PIXEL, THIN_BYTES_PER_PIXEL = (560, 1100), (380, 500)
FULL_CHANNELS = 1024  # of the widest layer; thin networks have 384
MEMORY_SHARE = 3 / 8  # of the GPU, for each of the two profiles whose size depends on it

KEPT_PLANS = 4

logger = logging.getLogger(__name__)


class EngineError(Exception):
    """The engine was not built; one subclass for each cause."""


class ModelMissing(EngineError):
    """There is no exported ONNX file."""

    def __init__(self, path: Path) -> None:
        super().__init__(f"there is no ONNX file {path}: export the model into this repository")


class NoGpu(EngineError):
    """The CUDA driver is absent or sees no GPU."""

    def __init__(self, reason: str) -> None:
        super().__init__(
            f"no GPU: {reason}. An engine is built on the GPU that serves it; in Docker, give the "
            "container one (--gpus all)"
        )


class TensorRtMissing(EngineError):
    """The Python package ``tensorrt`` cannot be imported."""

    def __init__(self, reason: str) -> None:
        super().__init__(
            f"TensorRT's Python package does not load: {reason}. Install `tensorrt` in the version "
            "that Triton brings"
        )


class TensorRtVersion(EngineError):
    """TensorRT's version is not among the supported ones."""

    def __init__(self, version: str) -> None:
        supported = " or ".join(map(str, SUPPORTED_MAJORS))
        super().__init__(f"TensorRT {version} does not do: version {supported} is needed")


class TensorRtUnusable(EngineError):
    """TensorRT does not start on this GPU and driver."""

    def __init__(self, version: str, reason: str) -> None:
        super().__init__(
            f"TensorRT {version} does not start: {reason}. GPU and driver must be ones that this "
            "version supports"
        )


class PluginUnusable(EngineError):
    """The plugin library is not there, does not load, or has not the plugin in it."""

    def __init__(self, library: str, reason: str) -> None:
        super().__init__(
            f"the TensorRT plugin {library} cannot be used: {reason}. Build plugins/ against this "
            "TensorRT, and name the library with --plugin"
        )


class ModelRejected(EngineError):
    """The file is no ONNX, or TensorRT's parser does not take it."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"TensorRT cannot read {path}: {reason}. Export the model again")


class PluginNotUsed(EngineError):
    """The correlation became many standard layers instead of the plugin's one."""

    def __init__(self, path: Path) -> None:
        super().__init__(
            f"TensorRT took the function body of the correlation in {path}, not the plugin: its "
            f"node must name the plugin_namespace {PLUGIN_NAMESPACE!r}. Export the model again"
        )


class OutOfMemory(EngineError):
    """The GPU has not the memory to build the engine, or to run it."""

    def __init__(self, gpu: "Gpu", reason: str) -> None:
        super().__init__(
            f"not enough memory on {gpu.name} ({gpu.memory / 2**30:.1f} GiB) for the engine: "
            f"{reason}. Stop what else runs there, or export with --precision fp16"
        )


class BuildFailed(EngineError):
    """TensorRT gave up for another reason."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"TensorRT did not build the engine: {reason}")


class EngineUnusable(EngineError):
    """TensorRT built the engine and cannot run it."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"TensorRT does not load the engine: {reason}")


class DiskFull(EngineError):
    """No space for the engine."""

    def __init__(self, folder: Path, needed: int) -> None:
        free = shutil.disk_usage(folder).free
        super().__init__(
            f"no space for the engine in {folder}: {needed / 2**20:.0f} MiB are needed, "
            f"{free / 2**20:.0f} MiB are free"
        )


class NotWritable(EngineError):
    """The model's folder does not take the engine."""

    def __init__(self, error: OSError) -> None:
        super().__init__(f"the engine cannot be written: {error}")


@dataclass(frozen=True)
class Gpu:
    """The GPU that CUDA programs use unless told otherwise."""

    name: str
    memory: int  # bytes


@dataclass(frozen=True)
class Profile:
    """Sizes ``(batch, height, width)`` that the engine takes, and the one that it is tuned for."""

    minimum: tuple[int, int, int]
    optimum: tuple[int, int, int]
    maximum: tuple[int, int, int]


def build_engine(
    repository: Path,
    name: str,
    plugin: str = PLUGIN,
    timing_cache: Path | None = None,
    force: bool = False,
) -> Path:
    """Make ``<repository>/<name>/1/model.plan`` an engine that fits and loads; build it if need be.

    Args:
        plugin: file of the plugin library, or a name that the loader finds.
        timing_cache: file of TensorRT's measurements, which make the next build shorter; default
            ``timing.cache`` beside the plan.
        force: build even if there is a plan that fits.

    Returns:
        The plan, to which ``model.plan`` is a link.

    Raises:
        EngineError: a subclass for each cause.
    """
    folder = repository / name / "1"
    path = folder / HALF_MODEL
    model = read_model(path)
    gpu = find_gpu()
    trt = import_tensorrt()
    needs_plugin = any(node.domain == PLUGIN_NAMESPACE for node in model.graph.node)
    library = load_plugin(trt, plugin) if needs_plugin else None
    log = trt_logger(trt)

    limits = profiles(gpu.memory, bytes_per_pixel(model))
    plan = folder / plan_name(gpu, fingerprint(gpu, trt.__version__, library, path, limits))
    if plan.is_file() and not force:
        try:
            check_loading(trt, plan.read_bytes(), gpu, log)
        except (EngineUnusable, OSError) as error:
            logger.warning("%s is built anew: %s", plan, error)
        else:
            logger.info("%s fits %s and TensorRT %s", plan, gpu.name, trt.__version__)
            use_plan(plan)
            return plan
    logger.info("building %s for %s with TensorRT %s", plan, gpu.name, trt.__version__)
    started = time.monotonic()
    try:
        builder = trt.Builder(log)
    except TypeError as error:  # what a null pointer from C++ becomes
        raise TensorRtUnusable(trt.__version__, log.last_error or str(error)) from None
    network = parse(trt, builder, path, log)
    if needs_plugin:
        check_plugin_layer(trt, network, path)
    config = configure(trt, builder, limits)
    with timings_kept(config, timing_cache or folder / "timing.cache"):
        serialized = builder.build_serialized_network(network, config)
    if serialized is None:
        raise failure(gpu, log.errors, BuildFailed)
    check_loading(trt, serialized, gpu, log)
    write_whole(plan, serialized)
    use_plan(plan)
    logger.info("built %s in %.0f s", plan, time.monotonic() - started)
    return plan


def read_model(path: Path) -> onnx.ModelProto:
    """The exported model.

    Raises:
        ModelMissing, ModelRejected
    """
    try:
        return onnx.load(path)
    except FileNotFoundError:
        raise ModelMissing(path) from None
    except (DecodeError, OSError) as error:
        raise ModelRejected(path, str(error)) from None


def find_gpu() -> Gpu:
    """Ask the CUDA driver.

    Raises:
        NoGpu
    """
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise NoGpu(f"no CUDA driver ({error})") from None
    name, memory, device = ctypes.create_string_buffer(256), ctypes.c_size_t(), ctypes.c_int()
    status = (
        cuda.cuInit(0)
        or cuda.cuDeviceGet(ctypes.byref(device), 0)
        or cuda.cuDeviceGetName(name, len(name), device)
        or cuda.cuDeviceTotalMem_v2(ctypes.byref(memory), device)
    )
    if status:
        raise NoGpu(f"the CUDA driver answers with error {status}")
    return Gpu(name.value.decode(), memory.value)


def import_tensorrt() -> ModuleType:
    """TensorRT's Python package.

    Raises:
        TensorRtMissing, TensorRtVersion
    """
    try:
        trt = importlib.import_module("tensorrt")
    except (ImportError, OSError) as error:
        raise TensorRtMissing(str(error)) from None
    check_version(trt.__version__)
    return trt


def check_version(version: str) -> None:
    """Raises TensorRtVersion for one that is not supported."""
    if int(version.split(".", maxsplit=1)[0]) not in SUPPORTED_MAJORS:
        raise TensorRtVersion(version)


def load_plugin(trt: Any, library: str) -> Path:
    """Load the plugin library, which registers the plugin; returns its file.

    Raises:
        PluginUnusable
    """
    try:
        ctypes.CDLL(library)
    except OSError as error:
        raise PluginUnusable(library, str(error)) from None
    registry = trt.get_plugin_registry()
    if registry.get_creator(PLUGIN_NAME, PLUGIN_VERSION, PLUGIN_NAMESPACE) is None:
        raise PluginUnusable(library, f"it registers no {PLUGIN_NAMESPACE}::{PLUGIN_NAME}")
    # The loader may have found it anywhere; what is mapped into this process says where.
    for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines():
        file = Path(line.split(maxsplit=5)[-1])
        if file.name == Path(library).resolve().name:
            return file
    raise PluginUnusable(library, "it is not among the libraries of this process")


def fingerprint(
    gpu: Gpu,
    tensorrt_version: str,
    plugin: Path | None,
    model: Path,
    engine_profiles: tuple[Profile, ...],
) -> str:
    """A hash of what an engine is built from: another value of any of these asks for another."""
    origin = {
        "gpu": gpu.name,
        "gpu_memory": gpu.memory,
        "tensorrt": tensorrt_version,
        "plugin": _sha256(plugin) if plugin else "",
        "onnx": _sha256(model),
        "profiles": [asdict(profile) for profile in engine_profiles],
        "builder": _sha256(Path(__file__)),  # all other settings
    }
    return hashlib.sha256(json.dumps(origin).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def plan_name(gpu: Gpu, origin: str) -> str:
    """Name of the plan of a fingerprint, such as ``NVIDIA-L4-0123456789abcdef.plan``."""
    return f"{re.sub(r'[^A-Za-z0-9]+', '-', gpu.name)}-{origin[:16]}.plan"


def use_plan(plan: Path) -> None:
    """Make ``model.plan`` a link to a plan beside it, and keep the KEPT_PLANS used last.

    Raises:
        DiskFull, NotWritable
    """
    try:
        os.utime(plan)
        with replacing(plan.with_name("model.plan")) as new:
            new.unlink(missing_ok=True)  # of a process that was killed
            new.symlink_to(plan.name)
        plans = [file for file in plan.parent.glob("*.plan") if not file.is_symlink()]
        for old in sorted(plans, key=lambda file: file.stat().st_mtime)[:-KEPT_PLANS]:
            old.unlink()
    except OSError as error:
        raise _not_written(error, plan.parent, 0) from None


def check_loading(trt: Any, plan: Any, gpu: Gpu, log: Any) -> None:
    """Load an engine as Triton will: one execution context for each profile, with its memory.

    Args:
        plan: its bytes.

    Raises:
        OutOfMemory, EngineUnusable, TensorRtUnusable
    """
    before = len(log.errors)
    try:
        runtime = trt.Runtime(log)
    except TypeError as error:  # what a null pointer from C++ becomes
        raise TensorRtUnusable(trt.__version__, log.last_error or str(error)) from None
    engine = runtime.deserialize_cuda_engine(plan)
    contexts = []  # all at once
    for profile in range(engine.num_optimization_profiles if engine else 0):
        context = engine.create_execution_context(
            trt.ExecutionContextAllocationStrategy.ON_PROFILE_CHANGE
        )
        if context is None or not context.set_optimization_profile_async(profile, 0):
            break
        contexts.append(context)
    if engine is None or len(contexts) < engine.num_optimization_profiles:
        raise failure(gpu, log.errors[before:], EngineUnusable)


def write_whole(target: Path, content: Any) -> None:
    """Write bytes to a file that at any time is the old or the new one.

    Raises:
        DiskFull, NotWritable
    """
    try:
        with replacing(target) as new:
            new.write_bytes(content)
    except OSError as error:
        raise _not_written(error, target.parent, memoryview(content).nbytes) from None


def _not_written(error: OSError, folder: Path, needed: int) -> EngineError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DiskFull(folder, needed)
    return NotWritable(error)


def bytes_per_pixel(model: onnx.ModelProto) -> int:
    """Activation memory that a network needs for each pixel of a batch.

    Float16 is that of the convolutions' weights.
    """
    weights = [tensor for tensor in model.graph.initializer if len(tensor.dims) == 4]
    full = max((tensor.dims[0] for tensor in weights), default=0) >= FULL_CHANNELS
    half = any(tensor.data_type == onnx.TensorProto.FLOAT16 for tensor in weights)
    return (FULL_BYTES_PER_PIXEL if full else THIN_BYTES_PER_PIXEL)[0 if half else 1]


def profiles(gpu_memory: int, pixel_bytes: int) -> tuple[Profile, Profile, Profile]:
    """The usual size; batches of other sizes; single pairs of any size that the GPU has memory for.

    The first is tuned between one caller and a full batch. Triton itself makes batches of small
    images alone (plugins/triton_batching.cpp); a single pair may thus be far larger.

    Their order is that of the profiles in ``configs/tensorrt.pbtxt``. Triton takes the profile
    whose optimum lies nearest among those that hold the request.
    """
    pixels = gpu_memory * MEMORY_SHARE / pixel_bytes
    batch_edge = min(LARGEST_BATCH_EDGE, max(SMALLEST_BATCH_EDGE, _edge(pixels / MAX_BATCH_SIZE)))
    single_edge = min(LARGEST_EDGE, max(batch_edge, _edge(pixels)))
    least = (1, SMALLEST_EDGE, SMALLEST_EDGE)
    batch_height, batch_width = (min(batch_edge, size) for size in BATCH_OPTIMUM)
    single_height, single_width = (min(single_edge, size) for size in SINGLE_OPTIMUM)
    return (
        Profile((1, *GRID), (MAX_BATCH_SIZE // 2, *GRID), (MAX_BATCH_SIZE, *GRID)),
        Profile(
            least,
            (MAX_BATCH_SIZE // 2, batch_height, batch_width),
            (MAX_BATCH_SIZE, batch_edge, batch_edge),
        ),
        Profile(
            least,
            (1, single_height, single_width),
            (1, single_edge, single_edge),
        ),
    )


def _edge(pixels: float) -> int:
    """Edge of the largest square with so many pixels, a multiple of the networks' 64."""
    return math.isqrt(int(pixels)) // 64 * 64


def parse(trt: Any, builder: Any, model: Path, log: Any) -> Any:
    """The network of an ONNX file, its layers' types those of the file.

    Raises:
        ModelRejected
    """
    # The default from TensorRT 11 on.
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(model)):
        reasons = [str(parser.get_error(i)) for i in range(parser.num_errors)]
        raise ModelRejected(model, _one_line(reasons[0] if reasons else log.last_error))
    return network


def check_plugin_layer(trt: Any, network: Any, model: Path) -> None:
    """Raises PluginNotUsed for a network without plugin layer."""
    layers = (network.get_layer(i).type for i in range(network.num_layers))
    if trt.LayerType.PLUGIN_V3 not in layers:
        raise PluginNotUsed(model)


def configure(trt: Any, builder: Any, engine_profiles: tuple[Profile, ...]) -> Any:
    """Settings of the build: profiles, and progress in the log."""
    config = builder.create_builder_config()
    for profile in engine_profiles:
        sizes = (profile.minimum, profile.optimum, profile.maximum)
        shapes = builder.create_optimization_profile()
        for image in IMAGE_INPUTS:
            shapes.set_shape(image, *((*size, 3) for size in sizes))
        config.add_optimization_profile(shapes)
    config.progress_monitor = progress_monitor(trt)
    return config


@contextlib.contextmanager
def timings_kept(config: Any, file: Path) -> Iterator[None]:
    """Start from the measurements of earlier builds, if they are of this GPU and TensorRT.

    What is measured meanwhile is kept, of a build that fails too: the next one is shorter then.
    """
    try:
        measured = file.read_bytes() if file.is_file() else b""
    except OSError as error:
        logger.warning("measuring anew: %s", error)
        measured = b""
    if not config.set_timing_cache(config.create_timing_cache(measured), ignore_mismatch=False):
        logger.info("%s is of another GPU or TensorRT: measuring anew", file)
        config.set_timing_cache(config.create_timing_cache(b""), ignore_mismatch=False)
    try:
        yield
    finally:
        try:
            write_whole(file, config.get_timing_cache().serialize())
        except EngineError as error:
            logger.warning("the next build measures anew: %s", error)


def failure(
    gpu: Gpu, errors: list[str], otherwise: type[BuildFailed] | type[EngineUnusable]
) -> EngineError:
    """What TensorRT's messages say about something without a result."""
    for message in errors:
        if re.search(r"out ?of ?memory|insufficient memory|amount of GPU memory", message, re.I):
            return OutOfMemory(gpu, _one_line(message))
    return otherwise(_one_line(errors[-1]) if errors else "it gives no reason")


def _one_line(message: str) -> str:
    return " ".join(message.split())


def trt_logger(trt: Any) -> Any:
    """A logger for TensorRT that passes messages on to ours and keeps the errors."""

    class Forwarding(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        @property
        def last_error(self) -> str:
            return _one_line(self.errors[-1]) if self.errors else ""

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.Severity.INTERNAL_ERROR, trt.ILogger.Severity.ERROR):
                self.errors.append(message)
                logger.error("TensorRT: %s", message)
            elif severity == trt.ILogger.Severity.WARNING:
                logger.warning("TensorRT: %s", message)
            else:
                logger.debug("TensorRT: %s", message)

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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``python -m export tensorrt``."""
    parser.description = "Build the TensorRT engine of an exported model on the GPU at hand."
    parser.add_argument("--repository", required=True, type=Path, metavar="DIR")
    parser.add_argument(
        "--name", default="flownet2", help="the model's name (default: %(default)s)"
    )
    parser.add_argument(
        "--plugin", default=PLUGIN, metavar="FILE", help="plugin library (default: %(default)s)"
    )
    parser.add_argument(
        "--timing-cache",
        type=Path,
        metavar="FILE",
        help="TensorRT's measurements, kept for the next build (default: beside the engine)",
    )
    parser.add_argument("--force", action="store_true", help="build even if the engine fits")


def run(arguments: argparse.Namespace) -> int:
    """Build the engine; returns the process's exit status."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    try:
        build_engine(
            arguments.repository,
            arguments.name,
            arguments.plugin,
            arguments.timing_cache,
            arguments.force,
        )
    except EngineError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0

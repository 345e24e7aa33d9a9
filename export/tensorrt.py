"""The TensorRT engine of an exported model, built on the GPU that will serve it.

An engine fits one GPU type, one TensorRT version, one plugin and one ONNX file. Beside the plan
lies a note of those it was built from; it is built again when any of them differs.

Precision is that of the ONNX file's types (``--precision`` of the export); float32 convolutions
may use TF32, TensorRT's default.
"""

import argparse
import ctypes
import errno
import hashlib
import importlib
import json
import logging
import math
import re
import shutil
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import onnx
from google.protobuf.message import DecodeError

from export.repository import IMAGE_INPUTS, MAX_BATCH_SIZE, USUAL_SIZE, replacing

PLUGIN = "libflownet2_tensorrt.so"  # found by the loader in the image of Triton
PLUGIN_NAME, PLUGIN_VERSION, PLUGIN_NAMESPACE = "Correlation", "1", "flownet2"
SUPPORTED_MAJORS = (10, 11)  # IPluginV3 came with 10

# The gateway takes up to 4 megapixels at native size. Both axes go as far as the square of that,
# upright images being as common as wide ones.
LARGEST_EDGE = 2048
SMALLEST_EDGE = 16
NATIVE_OPTIMUM = (720, 1280)
# Activation memory of FlowNet2 for each pixel of the batch and byte of its type; TensorRT-RTX 1.7
# plans 542 bytes in float16 and 1041 in float32.
BYTES_PER_PIXEL = 272

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
    """The GPU has not the memory to build the engine."""

    def __init__(self, gpu: "Gpu", reason: str) -> None:
        super().__init__(
            f"not enough memory on {gpu.name} ({gpu.memory / 2**30:.1f} GiB) to build the engine: "
            f"{reason}. Stop what else runs there, or export with --precision fp16"
        )


class BuildFailed(EngineError):
    """TensorRT gave up for another reason."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"TensorRT did not build the engine: {reason}")


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
    """Build ``<repository>/<name>/1/model.plan`` unless it is there and fits.

    Args:
        plugin: file of the plugin library, or a name that the loader finds.
        timing_cache: file of TensorRT's measurements, which make the next build shorter; default
            ``timing.cache`` beside the plan.
        force: build even if the plan fits.

    Returns:
        The plan.

    Raises:
        EngineError: a subclass for each cause.
    """
    folder = repository / name / "1"
    path, plan = folder / "model.onnx", folder / "model.plan"
    model = read_model(path)
    gpu = find_gpu()
    trt = import_tensorrt()
    needs_plugin = any(node.domain == PLUGIN_NAMESPACE for node in model.graph.node)
    library = load_plugin(trt, plugin) if needs_plugin else None

    origin = fingerprint(gpu, trt.__version__, library, path)
    if not force and is_current(plan, origin):
        logger.info("%s fits %s and TensorRT %s", plan, gpu.name, trt.__version__)
        return plan
    logger.info("building %s for %s with TensorRT %s", plan, gpu.name, trt.__version__)
    started = time.monotonic()
    log = trt_logger(trt)
    try:
        builder = trt.Builder(log)
    except TypeError as error:  # what a null pointer from C++ becomes
        raise TensorRtUnusable(trt.__version__, log.last_error or str(error)) from None
    network = parse(trt, builder, path, log)
    if needs_plugin:
        check_plugin_layer(trt, network, path)
    cache = timing_cache or folder / "timing.cache"
    config = configure(trt, builder, profiles(native_edge(gpu.memory, is_half(model))))
    use_timing_cache(config, cache)
    serialized = builder.build_serialized_network(network, config)
    if serialized is None:
        raise build_error(gpu, log.errors)
    write_engine(plan, serialized, origin)
    write_whole(cache, config.get_timing_cache().serialize())
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
    except DecodeError as error:
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
    gpu: Gpu, tensorrt_version: str, plugin: Path | None, model: Path
) -> dict[str, str | int]:
    """What an engine is built from: another value of any of these asks for another engine."""
    return {
        "gpu": gpu.name,
        "gpu_memory": gpu.memory,
        "tensorrt": tensorrt_version,
        "plugin": _sha256(plugin) if plugin else "",
        "onnx": _sha256(model),
        "builder": _sha256(Path(__file__)),  # profiles and settings
    }


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def note_of(plan: Path) -> Path:
    """The file beside a plan that holds its fingerprint."""
    return plan.with_name(f"{plan.name}.json")


def is_current(plan: Path, origin: dict[str, str | int]) -> bool:
    """Whether the plan is there and was built from `origin`."""
    try:
        noted = json.loads(note_of(plan).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return plan.is_file() and bool(noted == origin)


def write_engine(plan: Path, content: Any, origin: dict[str, str | int]) -> None:
    """Put plan and note in the place of older ones.

    An interruption between the two leaves a note that does not fit: the engine is built again.

    Raises:
        DiskFull, NotWritable
    """
    write_whole(plan, content)
    write_whole(note_of(plan), json.dumps(origin, indent=2).encode())


def write_whole(target: Path, content: Any) -> None:
    """Write bytes to a file that at any time is the old or the new one.

    Raises:
        DiskFull, NotWritable
    """
    try:
        with replacing(target) as new:
            new.write_bytes(content)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFull(target.parent, memoryview(content).nbytes) from None
        raise NotWritable(error) from None


def is_half(model: onnx.ModelProto) -> bool:
    """Whether the convolutions' weights are float16."""
    return any(tensor.data_type == onnx.TensorProto.FLOAT16 for tensor in model.graph.initializer)


def native_edge(gpu_memory: int, half: bool) -> int:
    """Largest height and width at native size: half of the GPU's memory holds a full batch.

    Triton makes batches of whatever size is asked for, so a full one must fit; the other half is
    for weights, the usual size, and other models.
    """
    per_pixel = BYTES_PER_PIXEL * (2 if half else 4)
    edge = math.isqrt(gpu_memory // 2 // (MAX_BATCH_SIZE * per_pixel))
    return min(LARGEST_EDGE, edge // 64 * 64)


def profiles(edge: int) -> tuple[Profile, Profile]:
    """The usual size, tuned between one caller and a full batch, and any size up to `edge`.

    Their order is that of the profiles in ``configs/tensorrt.pbtxt``. Triton takes the profile
    whose optimum lies nearest among those that hold the request.
    """
    height, width = (min(edge, size) for size in NATIVE_OPTIMUM)
    return (
        Profile(
            (1, *USUAL_SIZE), (MAX_BATCH_SIZE // 2, *USUAL_SIZE), (MAX_BATCH_SIZE, *USUAL_SIZE)
        ),
        Profile(
            (1, SMALLEST_EDGE, SMALLEST_EDGE), (1, height, width), (MAX_BATCH_SIZE, edge, edge)
        ),
    )


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


def use_timing_cache(config: Any, file: Path) -> None:
    """Start from the measurements of earlier builds, if they are of this GPU and TensorRT."""
    measured = file.read_bytes() if file.is_file() else b""
    if not config.set_timing_cache(config.create_timing_cache(measured), ignore_mismatch=False):
        logger.info("%s is of another GPU or TensorRT: measuring anew", file)
        config.set_timing_cache(config.create_timing_cache(b""), ignore_mismatch=False)


def build_error(gpu: Gpu, errors: list[str]) -> EngineError:
    """What TensorRT's messages say about a build without a result."""
    for message in errors:
        if re.search(r"out ?of ?memory|insufficient memory|amount of GPU memory", message, re.I):
            return OutOfMemory(gpu, _one_line(message))
    return BuildFailed(_one_line(errors[-1]) if errors else "it gives no reason")


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

"""Exported files under TensorRT's parser and builder, and the engine builder around them.

TensorRT-RTX from PyPI is TensorRT's parser and builder without plugin layers, and builds for a GPU
that is not there. What it leaves open: the plugin's layer in a network, and a plan's speed.
"""

import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from export import tensorrt
from export.graph import correlation_function, export_onnx
from export.networks import NETWORKS, FlowNet2
from flownet2.contract import GRID, MAX_BATCH_SIZE
from plugins.correlation_cases import FLOWNET_CASES
from tests.support.correlation_model import one_node_model
from tests.support.exported import Exported

trt = pytest.importorskip("tensorrt_rtx")

GPU = tensorrt.Gpu("NVIDIA L4", 24 * 2**30)


class Rtx:
    """The engine builder's steps, with TensorRT-RTX for TensorRT."""

    def __init__(self) -> None:
        self.log = tensorrt.trt_logger(trt)
        self.builder = trt.Builder(self.log)

    def parse(self, model: Path) -> Any:
        return tensorrt.parse(trt, self.builder, model, self.log)

    def build(self, network: Any, model: onnx.ModelProto) -> Any:
        limits = tensorrt.profiles(GPU.memory, tensorrt.bytes_per_pixel(model))
        config = tensorrt.configure(trt, self.builder, limits)
        config.num_compute_capabilities = 1
        config.set_compute_capability(trt.ComputeCapability.SM89, 0)
        return self.builder.build_serialized_network(network, config)


@pytest.fixture
def rtx() -> Rtx:
    return Rtx()


def layers(network: Any) -> list[Any]:
    return [network.get_layer(i) for i in range(network.num_layers)]


def test_parser_takes_every_network(
    exported: Exported, rtx: Rtx, caplog: pytest.LogCaptureFixture
) -> None:
    network = rtx.parse(exported.file)
    assert [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING] == []
    tensors = [network.get_input(0), network.get_input(1), network.get_output(0)]
    assert [(t.name, t.dtype, tuple(t.shape)) for t in tensors] == [
        ("image1", trt.uint8, (-1, -1, -1, 3)),
        ("image2", trt.uint8, (-1, -1, -1, 3)),
        ("flow", trt.float32, (-1, -1, -1, 2)),
    ]
    # Types come from the file: only blocks and correlation are in half precision, not images,
    # flow and what warps by it.
    blocks = {trt.LayerType.CONVOLUTION, trt.LayerType.DECONVOLUTION, trt.LayerType.MATRIX_MULTIPLY}
    outside = {trt.LayerType.RESIZE, trt.LayerType.GRID_SAMPLE, trt.LayerType.REDUCE}
    for layer in layers(network):
        if layer.type in blocks:
            assert layer.get_output(0).dtype == (trt.float16 if exported.half else trt.float32)
        elif layer.type in outside:
            assert layer.get_output(0).dtype == trt.float32
    types = [layer.type for layer in layers(network)]
    refiners = len(exported.model.network.cascade) - 1
    warps = refiners + 2 * exported.model.network.fusion
    assert types.count(trt.LayerType.GRID_SAMPLE) == warps
    # One matrix product for each of the 21 displacements in y: the function body is in use.
    correlations = exported.model.network.cascade.count("C")
    assert types.count(trt.LayerType.MATRIX_MULTIPLY) == 21 * correlations


def test_builder_takes_every_network(exported: Exported, rtx: Rtx) -> None:
    plan = rtx.build(rtx.parse(exported.file), exported.proto)
    assert rtx.log.errors == []
    weights = exported.file.stat().st_size
    assert 0.9 * weights < plan.nbytes < 4 * weights  # something of it for each profile


def test_plan_of_a_network_with_means_over_both_images(tmp_path: Path, rtx: Rtx) -> None:
    """As NVIDIA's port normalises; written as every plan is."""
    model = export_onnx(FlowNet2(NETWORKS["FlowNet2-s"], pair_mean=True))
    onnx.save(model, tmp_path / "s.onnx")
    plan = rtx.build(rtx.parse(tmp_path / "s.onnx"), model)
    tensorrt.write_whole(tmp_path / "model.plan", plan)
    assert (tmp_path / "model.plan").read_bytes() == bytes(plan)


@pytest.fixture(scope="module")
def one_node(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Correlation with the attributes of FlowNetC."""
    case = FLOWNET_CASES[0]
    body = correlation_function(case.attributes)
    path = tmp_path_factory.mktemp("one_node") / "one_node.onnx"
    onnx.save(one_node_model(case, np.float32, [body]), path)
    return path


@pytest.fixture
def creator() -> Iterator[Any]:
    """A registered creator of plugins that notes what the parser asks it for, and refuses."""

    class Creator(trt.IPluginCreatorV3One):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IPluginCreatorV3One.__init__(self)
            self.name = tensorrt.PLUGIN_NAME
            self.plugin_version = tensorrt.PLUGIN_VERSION
            self.plugin_namespace = tensorrt.PLUGIN_NAMESPACE
            names = ("pad", "kernel_size", "max_displacement", "stride1", "stride2")
            self.field_names = trt.PluginFieldCollection(
                [trt.PluginField(n, np.array([]), trt.PluginFieldType.INT32) for n in names]
            )
            self.asked: list[dict[str, int]] = []

        def create_plugin(self, name: str, fields: Any, phase: Any) -> None:
            assert phase == trt.TensorRTPhase.BUILD
            self.asked.append({field.name: int(field.data.item()) for field in fields})

    creator = Creator()
    registry = trt.get_plugin_registry()
    assert registry.register_creator(creator, tensorrt.PLUGIN_NAMESPACE)
    yield creator
    registry.deregister_creator(creator)


def test_parser_asks_the_plugin_of_that_name_with_the_attributes(
    one_node: Path, creator: Any, rtx: Rtx
) -> None:
    with pytest.raises(tensorrt.ModelRejected, match=r"one_node\.onnx: .*create the plugin") as no:
        rtx.parse(one_node)
    assert "\n" not in str(no.value)
    attributes = {
        "pad": 20,
        "kernel_size": 1,
        "max_displacement": 20,
        "stride1": 1,
        "stride2": 2,
    }
    assert creator.asked == [attributes]


def test_function_body_in_place_of_the_plugin_is_an_error(one_node: Path, rtx: Rtx) -> None:
    network = rtx.parse(one_node)  # without a word
    with pytest.raises(tensorrt.PluginNotUsed, match=r"function body .*one_node\.onnx"):
        tensorrt.check_plugin_layer(trt, network, one_node)


def test_parser_rejects_other_files(tmp_path: Path, rtx: Rtx) -> None:
    (tmp_path / "model.onnx").write_bytes(b"no model")
    with pytest.raises(tensorrt.ModelRejected, match=r"cannot read .*model\.onnx: .*Export the"):
        rtx.parse(tmp_path / "model.onnx")


def test_progress_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    monitor = tensorrt.progress_monitor(trt, interval=0)
    monitor.phase_start("Building engine", None, 6)
    assert monitor.step_complete("Building engine", 0)
    monitor.phase_start("Timing tactics", "Building engine", 40)
    assert monitor.step_complete("Timing tactics", 9)
    monitor.phase_finish("Timing tactics")
    assert monitor.step_complete("Building engine", 1)
    monitor.phase_finish("Building engine")
    assert [record.getMessage().split(": ")[1] for record in caplog.records] == [
        "Building engine 1/6",
        "Building engine 1/6 > Timing tactics 10/40",
        "Building engine 2/6",
    ]
    caplog.clear()
    often = tensorrt.progress_monitor(trt)
    often.phase_start("Timing tactics", None, 1000)
    for step in range(1000):
        often.step_complete("Timing tactics", step)
    assert caplog.records == []


# Bytes for each pixel of a batch that TensorRT-RTX 1.7 plans.
FULL_FP16, FULL_FP32, THIN_FP32 = 542, 1041, 478
GIB = 2**30


@pytest.mark.parametrize(("channels", "full"), [(1026, True), (386, False)])
def test_memory_by_width_and_type(channels: int, full: bool) -> None:
    def weights(kind: type[np.floating[Any]]) -> onnx.ModelProto:
        arrays = np.zeros((channels, 2, 4, 4), kind), np.zeros(3, np.float32)
        tensors = [onnx.numpy_helper.from_array(array) for array in arrays]
        return onnx.helper.make_model(onnx.helper.make_graph([], "g", [], [], tensors))

    assert tensorrt.bytes_per_pixel(weights(np.float32)) >= (FULL_FP32 if full else THIN_FP32)
    half, single = (tensorrt.bytes_per_pixel(weights(k)) for k in (np.float16, np.float32))
    assert half >= (FULL_FP16 if full else THIN_FP32 / 2)
    assert half < single


def test_networks_are_told_apart_by_their_weights(exported: Exported) -> None:
    thin = exported.model.network.width < 1
    expected = tensorrt.THIN_BYTES_PER_PIXEL if thin else tensorrt.FULL_BYTES_PER_PIXEL
    assert tensorrt.bytes_per_pixel(exported.proto) == expected[0 if exported.half else 1]


@pytest.mark.parametrize("memory", [15 * GIB, GPU.memory, 48 * GIB, 141 * GIB])
@pytest.mark.parametrize("pixel_bytes", [380, 560, 1100])
def test_the_gpu_holds_what_the_profiles_allow(memory: int, pixel_bytes: int) -> None:
    planned = [
        profile.maximum[0] * profile.maximum[1] * profile.maximum[2] * pixel_bytes
        for profile in tensorrt.profiles(memory, pixel_bytes)
    ]
    weights = 700 * 2**20
    assert sum(planned) + weights < memory


@pytest.mark.parametrize(
    ("memory", "pixel_bytes", "height", "width"),
    [
        (10 * GIB, 500, 1440, 2560),  # thin networks
        (15 * GIB, 380, 3840, 1024),
        (15 * GIB, 560, 1440, 2560),  # FlowNet2 in float16
        (22 * GIB, 1100, 1440, 2560),
        (22 * GIB, 500, 1024, 4096),
        (40 * GIB, 560, 1024, 4096),
    ],
)
def test_a_single_pair_may_be_as_large_as_the_gateway_lets_in(
    memory: int, pixel_bytes: int, height: int, width: int
) -> None:
    *_, single = tensorrt.profiles(memory, pixel_bytes)
    assert height <= single.maximum[1]
    assert width <= single.maximum[2]


def test_tensors_stay_below_the_number_of_values_that_tensorrt_takes() -> None:
    for profile in tensorrt.profiles(2**50, 380):
        batch, height, width = profile.maximum
        assert batch * height * width * 82 < 2**31  # the fusion network's widest at full size


@pytest.mark.parametrize("memory", [4 * GIB, 8 * GIB, GPU.memory, 80 * GIB])
def test_triton_takes_the_first_profile_for_the_usual_size_alone(memory: int) -> None:
    usual, batches, single = tensorrt.profiles(memory, 1100)
    assert usual.minimum[1:] == usual.maximum[1:] == GRID
    assert batches.minimum == single.minimum == (1, 16, 16)
    assert batches.maximum[0] == MAX_BATCH_SIZE
    assert single.maximum[0] == 1
    batching = (Path(__file__).parents[2] / "plugins" / "triton_batching.cpp").read_text()
    assert "kLargestEdge = FLOWNET2_BATCH_EDGE;" in batching
    assert batches.maximum[1] == batches.maximum[2] >= tensorrt.SMALLEST_BATCH_EDGE

    for batch in range(1, 9):
        request = (batch, *GRID)
        # Triton's EvaluateTensorRTContext adds up differences, the sizes shifted by an axis.
        for compared in ((*request, 3), (batch, *request)):
            near, *far = (
                sum(
                    abs(optimum - size)
                    for optimum, size in zip((*profile.optimum, 3), compared, strict=True)
                )
                for profile in (usual, batches, single)
            )
            assert near < min(far)


PROFILES = tensorrt.profiles(GPU.memory, 500)


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    paths = {name: tmp_path / name for name in ("plugin.so", "model.onnx")}
    for name, path in paths.items():
        path.write_bytes(name.encode())
    return paths


def test_an_engine_fits_what_it_was_built_from_and_nothing_else(files: dict[str, Path]) -> None:
    plugin, model = files.values()

    def origin(
        gpu: tensorrt.Gpu = GPU,
        version: str = "11.1.0",
        library: Path | None = plugin,
        limits: tuple[tensorrt.Profile, ...] = PROFILES,
    ) -> str:
        return tensorrt.fingerprint(gpu, version, library, model, limits)

    first = origin()
    assert origin() == first
    others = [
        origin(gpu=tensorrt.Gpu("NVIDIA A10", GPU.memory)),
        origin(gpu=tensorrt.Gpu(GPU.name, GPU.memory // 2)),
        origin(version="11.2.0"),
        origin(library=None),
        origin(limits=PROFILES[:2]),
        origin(limits=tensorrt.profiles(GPU.memory, 1100)),
    ]
    for path in (plugin, model):
        content = path.read_bytes()
        path.write_bytes(b"another")
        others.append(origin())
        path.write_bytes(content)
    assert len({first, *others}) == 1 + len(others)
    assert origin() == first
    assert tensorrt.plan_name(GPU, first) == f"NVIDIA-L4-{first[:16]}.plan"


def test_plans_of_several_gpus_lie_side_by_side(tmp_path: Path) -> None:
    link = tmp_path / "model.plan"
    link.write_bytes(b"of an earlier version, no link")
    plans = [tmp_path / f"{number}.plan" for number in range(tensorrt.KEPT_PLANS + 1)]
    for age, plan in enumerate(reversed(plans[:-1]), 1):
        tensorrt.write_whole(plan, plan.name.encode())
        os.utime(plan, (0, 1_000_000 - age))
    for plan in (plans[0], plans[1], plans[0]):  # the GPUs take turns
        tensorrt.use_plan(plan)
        assert link.readlink() == Path(plan.name), "relative, as the volume may be moved"
        assert link.read_bytes() == plan.read_bytes()
    assert all(plan.is_file() for plan in plans[:-1])

    (tmp_path / ".model.plan.new").symlink_to("left by a process that was killed")
    tensorrt.write_whole(plans[-1], b"newest")
    tensorrt.use_plan(plans[-1])
    assert link.read_bytes() == b"newest"
    kept = {file for file in tmp_path.glob("*.plan") if not file.is_symlink()}
    assert kept == {*plans} - {plans[2]}, "the one that was not used for the longest time is gone"


def test_a_full_disk_leaves_the_older_engine(tmp_path: Path) -> None:
    plan = tmp_path / "a.plan"
    tensorrt.write_whole(plan, b"older")
    before = sorted(tmp_path.iterdir())
    (tmp_path / ".a.plan.new").symlink_to("/dev/full")
    with pytest.raises(tensorrt.DiskFull, match=r"no space .* 3 MiB are needed, \d+ MiB are free"):
        tensorrt.write_whole(plan, bytes(3 * 2**20))
    assert plan.read_bytes() == b"older"
    assert sorted(tmp_path.iterdir()) == before


def test_a_folder_that_takes_no_file(tmp_path: Path) -> None:
    (tmp_path / "1").touch()
    with pytest.raises(tensorrt.NotWritable, match=r"cannot be written: .*Not a directory"):
        tensorrt.write_whole(tmp_path / "1" / "model.plan", b"engine")


def test_plugin_library(creator: Any) -> None:
    with pytest.raises(
        tensorrt.PluginUnusable, match=r"nowhere\.so cannot be used: .*No such file"
    ):
        tensorrt.load_plugin(trt, "/nowhere.so")
    file = tensorrt.load_plugin(trt, "libm.so.6")  # the loader knows where it is
    assert file.is_absolute()
    assert file.name == "libm.so.6"
    trt.get_plugin_registry().deregister_creator(creator)
    try:
        with pytest.raises(tensorrt.PluginUnusable, match="registers no flownet2::Correlation"):
            tensorrt.load_plugin(trt, "libm.so.6")
    finally:
        trt.get_plugin_registry().register_creator(creator, tensorrt.PLUGIN_NAMESPACE)


def test_supported_versions() -> None:
    for version in ("10.0.1", "10.16.1.11", "11.1.0.106"):
        tensorrt.check_version(version)
    with pytest.raises(tensorrt.TensorRtVersion, match=r"9\.3\.0 does not do: version 10 or 11"):
        tensorrt.check_version("9.3.0")


@pytest.mark.skipif(find_spec("tensorrt") is not None, reason="TensorRT is installed")
def test_no_tensorrt() -> None:
    with pytest.raises(tensorrt.TensorRtMissing, match="does not load: No module named 'tensorrt'"):
        tensorrt.import_tensorrt()


class Timings:
    """A builder's configuration as far as measurements go; "other" are another GPU's."""

    def __init__(self) -> None:
        self.measured = b""

    def create_timing_cache(self, measured: bytes) -> bytes:
        return measured

    def set_timing_cache(self, measured: bytes, ignore_mismatch: bool) -> bool:
        self.measured = measured
        return measured != b"other"

    def get_timing_cache(self) -> "Timings":
        return self

    def serialize(self) -> bytes:
        return self.measured


def test_measurements_are_kept_of_builds_that_fail_too(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "timing.cache"
    config = Timings()

    def fail() -> None:
        with tensorrt.timings_kept(config, file):
            config.measured += b"a"
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    with tensorrt.timings_kept(config, file):
        assert config.measured == b"a"
        config.measured += b"b"
    assert file.read_bytes() == b"ab"

    file.write_bytes(b"other")
    with tensorrt.timings_kept(config, file):
        assert config.measured == b""
    assert caplog.records == []

    file.unlink()
    file.mkdir()  # takes no file
    with tensorrt.timings_kept(config, file):
        assert config.measured == b""
    (warning,) = caplog.records
    assert warning.levelname == "WARNING"
    assert "the next build measures anew: the engine cannot be written" in warning.getMessage()


class Contexts:
    """TensorRT's runtime and engine with three profiles, some of whose steps fail."""

    Runtime = ExecutionContextAllocationStrategy = ON_PROFILE_CHANGE = property(lambda self: self)
    num_optimization_profiles = 3
    __version__ = "11.1.0"

    def __init__(self, log: Any, fault: str = "") -> None:
        self.log, self.fault = log, fault
        self.selected: list[int] = []

    def __call__(self, log: Any) -> "Contexts":
        return self

    def _step(self, name: str) -> Any:
        if self.fault != name:
            return self
        self.log.log(trt.ILogger.Severity.ERROR, f"{name} failed: out of memory (1 GB)")
        return None

    def deserialize_cuda_engine(self, plan: bytes) -> Any:
        return self._step("deserialize")

    def create_execution_context(self, strategy: Any) -> Any:
        return self._step("context")

    def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
        self.selected.append(profile)
        return self._step("profile") is not None


def test_an_engine_is_loaded_with_the_memory_of_every_profile(rtx: Rtx) -> None:
    runtime = Contexts(rtx.log)
    tensorrt.check_loading(runtime, b"plan", GPU, rtx.log)
    assert runtime.selected == [0, 1, 2]
    for fault in ("deserialize", "context", "profile"):
        with pytest.raises(tensorrt.OutOfMemory, match=rf"L4 \(24.0 GiB\).*{fault} failed"):
            tensorrt.check_loading(Contexts(rtx.log, fault), b"plan", GPU, rtx.log)


@pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="there is a GPU")
def test_no_engine_is_loaded_without_a_gpu(rtx: Rtx) -> None:
    with pytest.raises((tensorrt.TensorRtUnusable, tensorrt.EngineUnusable)) as no:
        tensorrt.check_loading(trt, b"no plan", GPU, rtx.log)
    assert "\n" not in str(no.value)


def test_what_a_failed_build_says() -> None:
    memory = "[virtualMemoryBuffer.cpp::resizePhysical::154] Error Code 2: OutOfMemory\n(size 1 GB)"
    error = tensorrt.failure(GPU, ["[E] before", memory, "no engine"], tensorrt.BuildFailed)
    assert isinstance(error, tensorrt.OutOfMemory)
    assert "NVIDIA L4 (24.0 GiB)" in str(error)
    assert "\n" not in str(error)
    error = tensorrt.failure(
        GPU, ["first", "Could not find any implementation for node X"], tensorrt.BuildFailed
    )
    assert isinstance(error, tensorrt.BuildFailed)
    assert str(error).endswith("Could not find any implementation for node X")
    assert isinstance(tensorrt.failure(GPU, [], tensorrt.BuildFailed), tensorrt.BuildFailed)


def command(repository: Path) -> subprocess.CompletedProcess[str]:
    """`python -m export tensorrt` where PyTorch cannot be imported, as in Triton's image."""
    program = (
        "import runpy, sys; sys.modules['torch'] = None; "
        "runpy.run_module('export', None, '__main__')"
    )
    arguments = ["tensorrt", "--repository", str(repository), "--name", "flownet2"]
    return subprocess.run(
        [sys.executable, "-c", program, *arguments],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="there is a GPU")
def test_command_says_in_one_line_what_is_missing(tmp_path: Path, one_node: Path) -> None:
    model = tmp_path / "flownet2" / "1" / "model_fp16.onnx"
    model.parent.mkdir(parents=True)
    done = command(tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        f"error: there is no ONNX file {model}: export the model into this repository\n"
    )
    model.write_bytes(b"no model")
    assert command(tmp_path).stderr.startswith(f"error: TensorRT cannot read {model}: ")
    model.unlink()
    model.mkdir()
    assert command(tmp_path).stderr.startswith(f"error: TensorRT cannot read {model}: ")
    model.rmdir()

    model.write_bytes(one_node.read_bytes())
    with pytest.raises(tensorrt.NoGpu) as no:
        tensorrt.find_gpu()
    done = command(tmp_path)
    assert (done.returncode, done.stderr) == (1, f"error: {no.value}\n")
    assert done.stderr.startswith("error: no GPU: ")

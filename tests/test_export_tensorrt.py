"""Exported files under TensorRT's parser and builder, and the engine builder around them.

TensorRT-RTX from PyPI is TensorRT's parser and builder without plugin layers, and builds for a GPU
that is not there. What it leaves open: the plugin's layer in a network, and a plan's speed.
"""

import json
import logging
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from correlation_cases import FLOWNET_CASES
from correlation_model import one_node_model
from exported import Exported

from export import tensorrt
from export.networks import NETWORKS, FlowNet2
from export.onnx_export import correlation_function, export_onnx
from export.repository import MAX_BATCH_SIZE

trt = pytest.importorskip("tensorrt_rtx")

GPU = tensorrt.Gpu("NVIDIA L4", 24 * 2**30)


class Rtx:
    """The engine builder's steps, with TensorRT-RTX for TensorRT."""

    def __init__(self) -> None:
        self.log = tensorrt.trt_logger(trt)
        self.builder = trt.Builder(self.log)

    def parse(self, model: Path) -> Any:
        return tensorrt.parse(trt, self.builder, model, self.log)

    def build(self, network: Any, half: bool) -> Any:
        limits = tensorrt.profiles(tensorrt.native_edge(GPU.memory, half))
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
    plan = rtx.build(rtx.parse(exported.file), exported.half)
    assert rtx.log.errors == []
    weights = exported.file.stat().st_size
    assert 0.9 * weights < plan.nbytes < 2.5 * weights


def test_plan_of_a_network_with_means_over_both_images(tmp_path: Path, rtx: Rtx) -> None:
    """As NVIDIA's port normalises; written as every plan is."""
    onnx.save(export_onnx(FlowNet2(NETWORKS["FlowNet2-s"], pair_mean=True)), tmp_path / "s.onnx")
    plan = rtx.build(rtx.parse(tmp_path / "s.onnx"), half=False)
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


def test_half_of_the_gpu_holds_a_full_batch_at_native_size() -> None:
    for memory in (8 * 2**30, GPU.memory, 48 * 2**30):
        for half, per_pixel in ((True, 542), (False, 1041)):  # what TensorRT-RTX 1.7 plans
            edge = tensorrt.native_edge(memory, half)
            assert edge % 64 == 0
            assert MAX_BATCH_SIZE * edge**2 * per_pixel <= memory / 2
            larger = (edge + 64) ** 2
            assert edge == 2048 or MAX_BATCH_SIZE * larger * per_pixel > 0.95 * memory / 2
    assert tensorrt.native_edge(80 * 2**30, half=True) == 2048


@pytest.mark.parametrize("edge", [576, 704, 1216, 2048])
def test_triton_takes_the_first_profile_for_the_usual_size_alone(edge: int) -> None:
    usual, native = tensorrt.profiles(edge)
    assert native.minimum == (1, 16, 16)
    assert native.maximum == (8, edge, edge)
    for batch in range(1, 9):
        request = (batch, 512, 512)
        assert all(
            low <= size <= high
            for low, size, high in zip(usual.minimum, request, usual.maximum, strict=True)
        )
        # Triton's EvaluateTensorRTContext adds up differences, the sizes shifted by an axis.
        for compared in ((*request, 3), (batch, *request)):
            near, far = (
                sum(
                    abs(optimum - size)
                    for optimum, size in zip((*profile.optimum, 3), compared, strict=True)
                )
                for profile in (usual, native)
            )
            assert near < far
    assert usual.minimum[1:] == usual.maximum[1:]


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    paths = {name: tmp_path / name for name in ("model.plan", "plugin.so", "model.onnx")}
    for name in ("plugin.so", "model.onnx"):
        paths[name].write_bytes(name.encode())
    return paths


def test_an_engine_fits_what_it_was_built_from_and_nothing_else(files: dict[str, Path]) -> None:
    plan, plugin, model = files.values()

    def origin(
        gpu: tensorrt.Gpu = GPU, version: str = "11.1.0", library: Path | None = plugin
    ) -> dict[str, str | int]:
        return tensorrt.fingerprint(gpu, version, library, model)

    first = origin()
    assert not tensorrt.is_current(plan, first)
    tensorrt.write_engine(plan, b"engine", first)
    assert plan.read_bytes() == b"engine"
    assert tensorrt.is_current(plan, origin())

    others: list[Callable[[], dict[str, str | int]]] = [
        lambda: origin(gpu=tensorrt.Gpu("NVIDIA A10", GPU.memory)),
        lambda: origin(gpu=tensorrt.Gpu(GPU.name, GPU.memory // 2)),
        lambda: origin(version="11.2.0"),
        lambda: origin(library=None),
    ]
    assert not any(tensorrt.is_current(plan, other()) for other in others)
    for path in (plugin, model):
        content = path.read_bytes()
        path.write_bytes(b"another")
        assert not tensorrt.is_current(plan, origin())
        path.write_bytes(content)
    assert tensorrt.is_current(plan, origin())

    plan.unlink()
    assert not tensorrt.is_current(plan, first)


def test_an_engine_without_a_whole_note_is_built_again(files: dict[str, Path]) -> None:
    plan = files["model.plan"]
    origin = tensorrt.fingerprint(GPU, "11.1.0", None, files["model.onnx"])
    tensorrt.write_engine(plan, b"engine", origin)
    note = tensorrt.note_of(plan)
    whole = note.read_text()
    assert json.loads(whole)["gpu"] == "NVIDIA L4"
    note.write_text(whole[:-2])
    assert not tensorrt.is_current(plan, origin)
    note.unlink()
    assert not tensorrt.is_current(plan, origin)


def test_a_full_disk_leaves_the_older_engine(files: dict[str, Path]) -> None:
    plan = files["model.plan"]
    origin = tensorrt.fingerprint(GPU, "11.1.0", None, files["model.onnx"])
    tensorrt.write_engine(plan, b"older", origin)
    before = sorted(plan.parent.iterdir())
    plan.with_name(".model.plan.new").symlink_to("/dev/full")
    newer = origin | {"gpu": "NVIDIA A10"}
    with pytest.raises(tensorrt.DiskFull, match=r"no space .* 3 MiB are needed, \d+ MiB are free"):
        tensorrt.write_engine(plan, bytes(3 * 2**20), newer)
    assert plan.read_bytes() == b"older"
    assert tensorrt.is_current(plan, origin)
    assert sorted(plan.parent.iterdir()) == before


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


def test_what_a_failed_build_says() -> None:
    memory = "[virtualMemoryBuffer.cpp::resizePhysical::154] Error Code 2: OutOfMemory\n(size 1 GB)"
    error = tensorrt.build_error(GPU, ["[E] something before", memory, "no engine"])
    assert isinstance(error, tensorrt.OutOfMemory)
    assert "NVIDIA L4 (24.0 GiB)" in str(error)
    assert "\n" not in str(error)
    error = tensorrt.build_error(GPU, ["first", "Could not find any implementation for node X"])
    assert isinstance(error, tensorrt.BuildFailed)
    assert str(error).endswith("Could not find any implementation for node X")
    assert isinstance(tensorrt.build_error(GPU, []), tensorrt.BuildFailed)


def command(repository: Path) -> subprocess.CompletedProcess[str]:
    """`python -m export tensorrt` where PyTorch cannot be imported, as in Triton's image."""
    program = (
        "import runpy, sys; sys.modules['torch'] = None; "
        "runpy.run_module('export', None, '__main__')"
    )
    arguments = ["tensorrt", "--repository", str(repository), "--name", "flownet2"]
    return subprocess.run(
        [sys.executable, "-c", program, *arguments],
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="there is a GPU")
def test_command_says_in_one_line_what_is_missing(tmp_path: Path, one_node: Path) -> None:
    model = tmp_path / "flownet2" / "1" / "model.onnx"
    model.parent.mkdir(parents=True)
    done = command(tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        f"error: there is no ONNX file {model}: export the model into this repository\n"
    )
    model.write_bytes(b"no model")
    assert command(tmp_path).stderr.startswith(f"error: TensorRT cannot read {model}: ")

    model.write_bytes(one_node.read_bytes())
    with pytest.raises(tensorrt.NoGpu) as no:
        tensorrt.find_gpu()
    done = command(tmp_path)
    assert (done.returncode, done.stderr) == (1, f"error: {no.value}\n")
    assert done.stderr.startswith("error: no GPU: ")

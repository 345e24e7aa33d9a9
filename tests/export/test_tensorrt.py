"""Exported files under TensorRT's parser and builder, and the engine builder around them.

TensorRT-RTX from PyPI is TensorRT's parser and builder without plugin layers, and builds for a GPU
that is not there. It does not cover the plugin's layer in a network, and a plan's speed.
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

from export.engine import build, plans
from export.engine.gpu import EngineError, Gpu
from export.graph import correlation_function, export_onnx
from export.networks import NETWORKS, FlowNet2, Semantics
from flownet2.contract import BATCH_EDGE, GRID, MAX_BATCH_SIZE
from plugins.correlation_cases import FLOWNET_CASES
from tests.support.correlation_model import one_node_model
from tests.support.exported import Exported
from tests.support.plugins_build import needs, run

trt = pytest.importorskip("tensorrt_rtx")


class Rtx:
    """The engine builder's steps, with TensorRT-RTX for TensorRT."""

    def __init__(self) -> None:
        self.log = build.trt_logger(trt)
        self.builder = trt.Builder(self.log)

    def parse(self, model: Path) -> Any:
        return build.parse(trt, self.builder, model, self.log)

    def build(self, network: Any) -> Any:
        config = build.configure(trt, self.builder)
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
    # Types come from the file: only blocks are in half precision, not images, flow, what warps by
    # it, and the sums of the correlation.
    blocks = {trt.LayerType.CONVOLUTION, trt.LayerType.DECONVOLUTION}
    outside = {trt.LayerType.RESIZE, trt.LayerType.GATHER, trt.LayerType.REDUCE}
    for layer in layers(network):
        if layer.type in blocks:
            assert layer.get_output(0).dtype == (trt.float16 if exported.half else trt.float32)
        elif layer.type in outside:
            assert layer.get_output(0).dtype != trt.float16
    types = [layer.type for layer in layers(network)]
    refiners = len(exported.model.network.cascade) - 1
    warps = refiners + 2 * exported.model.network.fusion
    assert trt.LayerType.GRID_SAMPLE not in types  # TensorRT's is wrong in half precision
    assert types.count(trt.LayerType.GATHER) >= 4 * warps
    # One matrix product for each of the 21 displacements in y: the function body is in use.
    products = [
        layer.get_output(0).dtype
        for layer in layers(network)
        if layer.type == trt.LayerType.MATRIX_MULTIPLY and layer.name.startswith("Correlation/")
    ]
    assert products == [trt.float32] * 21 * exported.model.network.cascade.count("C")


def test_builder_takes_every_network(exported: Exported, rtx: Rtx) -> None:
    plan = rtx.build(rtx.parse(exported.file))
    assert not rtx.log.failed, rtx.log.cause
    weights = exported.file.stat().st_size
    assert 0.9 * weights < plan.nbytes < 4 * weights  # something of it for each profile


def test_builder_takes_means_over_both_images(tmp_path: Path, rtx: Rtx) -> None:
    """As NVIDIA's port normalises."""
    onnx.save(
        export_onnx(FlowNet2(NETWORKS["FlowNet2-s"], Semantics(mean="pair"))), tmp_path / "s.onnx"
    )
    assert rtx.build(rtx.parse(tmp_path / "s.onnx")).nbytes


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
    """A registered creator of plugins that records the parser's requests and rejects them."""

    class Creator(trt.IPluginCreatorV3One):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IPluginCreatorV3One.__init__(self)
            self.name, self.plugin_version, self.plugin_namespace = build.CORRELATION
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
    assert registry.register_creator(creator, build.CORRELATION[2])
    yield creator
    registry.deregister_creator(creator)


def test_parser_asks_the_plugin_of_that_name_with_the_attributes(
    one_node: Path, creator: Any, rtx: Rtx
) -> None:
    with pytest.raises(EngineError, match=r"one_node\.onnx: .*create the plugin") as no:
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
    with pytest.raises(EngineError, match="function body"):
        build.check_plugin_is_used(network)


def test_parser_rejects_other_files(tmp_path: Path, rtx: Rtx) -> None:
    (tmp_path / "model.onnx").write_bytes(b"no model")
    with pytest.raises(EngineError, match=r"model\.onnx is not an ONNX file. Export the"):
        rtx.parse(tmp_path / "model.onnx")


def test_progress_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    monitor = build.progress_monitor(trt, interval=0)
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
    often = build.progress_monitor(trt)
    often.phase_start("Timing tactics", None, 1000)
    for step in range(1000):
        often.step_complete("Timing tactics", step)
    assert caplog.records == []


# Batches of Triton, the gateway's default size, and sizes of videos.
@pytest.mark.parametrize(
    ("batch", "height", "width", "profile"),
    [
        (1, *GRID, 0),
        (MAX_BATCH_SIZE, *GRID, 0),
        (MAX_BATCH_SIZE, BATCH_EDGE, BATCH_EDGE, 0),
        (1, 16, 16, 0),
        (1, BATCH_EDGE + 1, 16, 1),
        (1, 16, BATCH_EDGE + 1, 1),
        (1, 720, 1280, 1),
        (1, 1080, 1920, 1),
        (1, 1920, 1080, 1),
        (1, 2048, 2048, 1),
    ],
)
def test_the_profile_that_triton_takes(batch: int, height: int, width: int, profile: int) -> None:
    """Follows Triton's TensorRT backend: EvaluateTensorRTContext in its instance_state.cc."""
    request = (batch, height, width)
    distances = {}
    for index, (least, best, most) in enumerate(build.PROFILES):
        if all(a <= size <= b for a, size, b in zip(least, request, most, strict=True)):
            compared = (batch, *request)  # the axis before, but for the first
            distances[index] = sum(abs(a - b) for a, b in zip((*best, 3), compared, strict=True))
    assert min(distances, key=lambda index: distances[index]) == profile


def test_every_small_image_goes_to_the_first_profile() -> None:
    (_, first, most), (_, second, _) = build.PROFILES
    for batch in range(1, most[0] + 1):
        for height in range(16, most[1] + 1):
            far, near = (
                abs(best[0] - batch) + abs(best[1] - batch) + abs(best[2] - height)
                for best in (second, first)
            )
            assert near < far


NVIDIA_L4 = Gpu("NVIDIA L4", (8, 9))


def test_a_plan_fits_what_it_was_built_from_and_nothing_else(tmp_path: Path) -> None:
    plugin, model = tmp_path / "plugin.so", tmp_path / "model.onnx"
    for path in (plugin, model):
        path.write_bytes(path.name.encode())

    def plan(gpu: Gpu = NVIDIA_L4, version: str = "11.1.0") -> Path:
        return plans.plan_path(tmp_path, gpu, version, (plugin, model))

    first = plan()
    assert plan() == first
    assert first.name.startswith("NVIDIA-L4-")
    others = [plan(gpu=Gpu("NVIDIA A10", (8, 6))), plan(version="11.2.0")]
    for path in (plugin, model):
        content = path.read_bytes()
        path.write_bytes(b"another")
        others.append(plan())
        path.write_bytes(content)
    assert len({first, *others}) == 1 + len(others)


def test_plans_of_two_gpus_lie_side_by_side(tmp_path: Path) -> None:
    link = tmp_path / "model.plan"
    link.write_bytes(b"of an earlier version, no link")
    (tmp_path / ".model.plan.new").symlink_to("left by a process that was killed")
    first, second, third = (tmp_path / f"{name}.plan" for name in "abc")
    for age, plan in enumerate((second, first)):
        plans.write_plan(plan, plan.name.encode())
        os.utime(plan, (0, 1_000_000 + age))
        plans.use_plan(plan)
        assert link.readlink() == Path(plan.name), "relative, as the volume may be moved"
        assert link.read_bytes() == plan.name.encode()
    plans.use_plan(second)
    plans.write_plan(third, b"newest")
    plans.use_plan(third)
    assert link.read_bytes() == b"newest"
    kept = {file for file in tmp_path.glob("*.plan") if not file.is_symlink()}
    assert kept == {second, third}, "the one that was not used for longer is gone"


def test_room_is_made_before_a_plan_is_written(tmp_path: Path) -> None:
    older = [tmp_path / f"{name}.plan" for name in "abc"]
    for age, plan in enumerate(older):
        plan.write_bytes(b"older")
        os.utime(plan, (0, 1_000_000 + age))
    (tmp_path / ".d.plan.new").symlink_to("/dev/full")
    with pytest.raises(EngineError, match=r"the engine \(3 MiB\) cannot be written: .*space"):
        plans.write_plan(tmp_path / "d.plan", bytes(3 * 2**20))
    assert sorted(tmp_path.iterdir()) == older[-1:]


def test_a_folder_that_takes_no_file(tmp_path: Path) -> None:
    (tmp_path / "1").touch()
    with pytest.raises(EngineError, match=r"cannot be written: .*Not a directory"):
        plans.write_plan(tmp_path / "1" / "a.plan", b"engine")


def test_plugin_library(creator: Any) -> None:
    with pytest.raises(EngineError, match=r"nowhere\.so does not load: .*No such file"):
        build.load_plugin(trt, "/nowhere.so")
    file = build.load_plugin(trt, "libm.so.6")  # the loader knows where it is
    assert file.is_absolute()
    assert file.name == "libm.so.6"
    trt.get_plugin_registry().deregister_creator(creator)
    try:
        with pytest.raises(EngineError, match="registers no plugin Correlation"):
            build.load_plugin(trt, "libm.so.6")
    finally:
        trt.get_plugin_registry().register_creator(creator, build.CORRELATION[2])


@pytest.mark.skipif(find_spec("tensorrt") is not None, reason="TensorRT is installed")
def test_no_tensorrt() -> None:
    with pytest.raises(EngineError, match="does not load: No module named 'tensorrt'"):
        build.import_tensorrt()


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
        with build.timings_kept(config, file):
            config.measured += b"a"
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    with build.timings_kept(config, file):
        assert config.measured == b"a"
        config.measured += b"b"
    assert file.read_bytes() == b"ab"

    file.write_bytes(b"other")
    with build.timings_kept(config, file):
        assert config.measured == b""
    assert caplog.records == []

    file.unlink()
    file.mkdir()  # takes no file
    with build.timings_kept(config, file):
        assert config.measured == b""
    (warning,) = caplog.records
    assert warning.levelname == "WARNING"
    assert "the next build measures again: " in warning.getMessage()


# A driver as export/engine/gpu.py asks it, of a GPU that the environment describes.
@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    needs("cc")
    folder = tmp_path_factory.mktemp("driver")
    source = Path(__file__).parents[1] / "support" / "libcuda.c"
    run("cc", "-Wall", "-shared", "-fPIC", source, "-o", folder / "libcuda.so.1")
    return folder


def command(repository: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """`python -m export tensorrt` where PyTorch cannot be imported, as in Triton's image."""
    program = (
        "import runpy, sys; sys.modules['torch'] = None; "
        "runpy.run_module('export', None, '__main__')"
    )
    arguments = ["tensorrt", "--repository", str(repository), "--name", "flownet2"]
    return subprocess.run(
        [sys.executable, "-c", program, *arguments],
        cwd=Path(__file__).parents[2],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({}, "TensorRT's Python package does not load"),
        ({"FAKE_CAPABILITY": "70"}, "NVIDIA Fake has compute capability 7.0, and 7.5 is needed"),
        (
            {"FAKE_DRIVER": "12090"},
            "the driver of NVIDIA Fake supports CUDA 12, and CUDA 13",
        ),
        ({"FAKE_STATUS": "100"}, "no GPU: the CUDA driver answers with error 100"),
    ],
    ids=["fit", "old GPU", "old driver", "no GPU"],
)
@pytest.mark.skipif(find_spec("tensorrt") is not None, reason="TensorRT is installed")
def test_command_says_in_one_line_what_is_missing(
    driver: Path, environment: dict[str, str], said: str, tmp_path: Path
) -> None:
    model = tmp_path / "flownet2" / "1" / "model_fp16.onnx"
    model.parent.mkdir(parents=True)
    model.touch()
    fit = {"FAKE_CAPABILITY": "89", "FAKE_DRIVER": "13010", "FAKE_STATUS": "0"}
    image = {"LD_LIBRARY_PATH": str(driver), "CUDA_VERSION": "13.0.1.012"}
    done = command(tmp_path, **image, **(fit | environment))
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"error: {said}")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="there is a GPU")
def test_command_without_model_or_driver(tmp_path: Path) -> None:
    model = tmp_path / "flownet2" / "1" / "model.onnx"
    assert command(tmp_path).stderr.startswith(f"error: {model} is missing: export the model")
    model.parent.mkdir(parents=True)
    model.touch()
    assert command(tmp_path).stderr.startswith("error: no GPU: no CUDA driver (libcuda.so.1")

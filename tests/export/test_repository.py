"""Every configuration, parsed with Triton's own protobuf, held against the contract."""

from pathlib import Path

import onnx
import pytest
from google.protobuf import text_format
from onnx import TensorProto, helper
from tritonclient.grpc import model_config_pb2 as pb

from export import repository

DESCRIPTION = {
    "network": "FlowNet2-c",
    "parameters": "5500000",
    "weights_source": 'the "training" folder',
    "weights_license": "GPL-3.0-or-later",
}
FILES = ("config.pbtxt", "configs/cpu.pbtxt", "configs/onnx.pbtxt", "configs/tensorrt.pbtxt")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    shape = ["batch", "height", "width"]
    images = [
        helper.make_tensor_value_info(name, TensorProto.UINT8, [*shape, 3])
        for name in ("image1", "image2")
    ]
    flow = helper.make_tensor_value_info("flow", TensorProto.FLOAT, [*shape, 2])
    graph = helper.make_graph([], "graph", images, [flow])
    return repository.write_model(
        tmp_path_factory.mktemp("repository"), "flownet2", helper.make_model(graph), DESCRIPTION
    )


def parse(file: Path) -> pb.ModelConfig:
    return text_format.Parse(file.read_text(encoding="utf-8"), pb.ModelConfig())


@pytest.mark.parametrize("file", FILES)
def test_configuration_keeps_the_contract(folder: Path, file: str) -> None:
    config = parse(folder / file)
    assert config.name == "flownet2"
    assert config.max_batch_size >= 8
    inputs = [(tensor.name, tensor.data_type, list(tensor.dims)) for tensor in config.input]
    assert inputs == [
        ("image1", pb.TYPE_UINT8, [-1, -1, 3]),
        ("image2", pb.TYPE_UINT8, [-1, -1, 3]),
    ]
    outputs = [(tensor.name, tensor.data_type, list(tensor.dims)) for tensor in config.output]
    assert outputs == [("flow", pb.TYPE_FP32, [-1, -1, 2])]
    parameters = {key: value.string_value for key, value in config.parameters.items()}
    if config.backend == "tensorrt":
        assert parameters.pop("execution_context_allocation_strategy") == "ON_PROFILE_CHANGE"
    if config.backend == "onnxruntime":
        assert parameters.pop("cudnn_conv_algo_search") == "1"  # HEURISTIC
    assert parameters == DESCRIPTION


@pytest.mark.parametrize("file", FILES)
def test_queue_is_bounded_and_rejects(folder: Path, file: str) -> None:
    batching = parse(folder / file).dynamic_batching
    assert 0 < batching.max_queue_delay_microseconds <= 5000
    queue = batching.default_queue_policy
    assert 0 < queue.max_queue_size <= 1000
    assert queue.timeout_action == pb.ModelQueuePolicy.REJECT
    assert queue.default_timeout_microseconds > 0
    assert queue.allow_timeout_override


def test_gateway_may_ask_for_its_longest_deadline() -> None:
    settings = pytest.importorskip("gateway.settings").Settings()
    assert settings.max_timeout_s * 1_000_000 <= repository.QUEUE_TIMEOUT_US


@pytest.mark.parametrize("file", FILES)
def test_warm_up_runs_the_usual_size(folder: Path, file: str) -> None:
    config = parse(folder / file)
    sizes = [warmup.batch_size for warmup in config.model_warmup]
    assert sizes == ([1, 8] if config.backend == "python" else list(range(1, 9)))
    for warmup in config.model_warmup:
        for tensor in config.input:
            image = warmup.inputs[tensor.name]
            assert (image.data_type, list(image.dims)) == (tensor.data_type, [512, 512, 3])
            assert image.WhichOneof("input_data_type") == "random_data"


def test_default_is_the_cpu(folder: Path) -> None:
    assert (folder / "config.pbtxt").read_bytes() == (folder / "configs/cpu.pbtxt").read_bytes()
    config = parse(folder / "config.pbtxt")
    assert (config.backend, config.default_model_filename) == ("python", "model.py")
    assert [(g.kind, g.count) for g in config.instance_group] == [
        (pb.ModelInstanceGroup.KIND_CPU, 1)
    ]


def test_onnx_runs_on_the_gpu_with_our_op_and_without_timing_algorithms(folder: Path) -> None:
    config = parse(folder / "configs/onnx.pbtxt")
    assert (config.backend, config.default_model_filename) == ("onnxruntime", "model.onnx")
    assert [g.kind for g in config.instance_group] == [pb.ModelInstanceGroup.KIND_GPU]
    assert not config.optimization.HasField("execution_accelerators")
    (library,) = config.model_operations.op_library_filename
    targets = (Path(__file__).parents[2] / "plugins" / "CMakeLists.txt").read_text()
    assert f"add_library({library.removeprefix('lib').removesuffix('.so')} SHARED" in targets


def test_tensorrt_has_a_cuda_graph_for_every_batch_size(folder: Path) -> None:
    config = parse(folder / "configs/tensorrt.pbtxt")
    assert (config.backend, config.default_model_filename) == ("tensorrt", "model.plan")
    assert config.optimization.cuda.graphs
    graphs = {
        graph.batch_size: {name: list(shape.dim) for name, shape in graph.input.items()}
        for graph in config.optimization.cuda.graph_spec
    }
    usual = {"image1": [512, 512, 3], "image2": [512, 512, 3]}
    assert graphs == dict.fromkeys(range(1, 9), usual)


def test_unknown_configuration_is_named() -> None:
    with pytest.raises(ValueError, match="no configuration 'gpu', only cpu, onnx, tensorrt"):
        repository.model_config("flownet2", "gpu", DESCRIPTION)


def test_writing_again_replaces_files_and_leaves_no_others(folder: Path) -> None:
    before = sorted(path.relative_to(folder) for path in folder.rglob("*"))
    model = onnx.load(folder / "1" / "model.onnx")
    model.producer_name = "again"
    repository.write_model(folder.parent, "flownet2", model, DESCRIPTION)
    assert sorted(path.relative_to(folder) for path in folder.rglob("*")) == before
    assert onnx.load(folder / "1" / "model.onnx").producer_name == "again"


def test_committed_configurations_are_what_the_exporter_writes() -> None:
    """The repository's own model folder; its description is part of it."""
    committed = Path(__file__).parents[2] / "model_repository" / "flownet2"
    if not (committed / "config.pbtxt").is_file():
        pytest.skip("model_repository/flownet2 is not committed yet")
    config = parse(committed / "config.pbtxt")
    description = {key: value.string_value for key, value in config.parameters.items()}
    for file in FILES:
        name = "cpu" if file == "config.pbtxt" else Path(file).stem
        expected = repository.as_text(repository.model_config("flownet2", name, description))
        assert (committed / file).read_text(encoding="utf-8") == expected

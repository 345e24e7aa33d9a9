"""The configurations, parsed with Triton's own protobuf, and what an export adds to them."""

import subprocess
from pathlib import Path

import onnx
import pytest
from google.protobuf import text_format
from onnx import TensorProto
from tritonclient.grpc import model_config_pb2 as pb

from export import repository
from flownet2 import contract
from tests.support.tiny_network import tiny_network

ROOT = Path(__file__).parents[2]
DESCRIPTION = {
    "network": "FlowNet2-c",
    "parameters": "5500000",
    "weights_source": 'the "training" folder, C:\\weights, größer',
    "weights_license": "GPL-3.0-or-later",
}


def parse(text: str) -> pb.ModelConfig:
    return text_format.Parse(text, pb.ModelConfig())


@pytest.fixture(params=repository.CONFIGURATIONS)
def config(request: pytest.FixtureRequest) -> pb.ModelConfig:
    return parse((repository.TEMPLATE / request.param).read_text(encoding="utf-8"))


def test_configuration_keeps_the_contract(config: pb.ModelConfig) -> None:
    assert config.max_batch_size == contract.MAX_BATCH_SIZE
    image = (pb.DataType.Value(f"TYPE_{contract.IMAGE_TYPE}"), [-1, -1, 3])
    assert {t.name: (t.data_type, list(t.dims)) for t in config.input} == dict.fromkeys(
        contract.IMAGE_INPUTS, image
    )
    (flow,) = config.output
    assert (flow.name, list(flow.dims)) == (contract.FLOW_OUTPUT, [-1, -1, 2])
    assert pb.DataType.Name(flow.data_type) == f"TYPE_{contract.FLOW_TYPE}"


def test_queue_is_bounded_and_rejects(config: pb.ModelConfig) -> None:
    """Without any of these limits Triton would prefetch batches (see triton_batching.cpp)."""
    queue = config.dynamic_batching.default_queue_policy
    assert 0 < queue.max_queue_size <= 1000
    assert queue.timeout_action == pb.ModelQueuePolicy.REJECT
    assert queue.allow_timeout_override
    longest = pytest.importorskip("gateway.settings").Settings().max_timeout_s
    assert queue.default_timeout_microseconds >= longest * 1_000_000


def test_warm_up_runs_one_pair_and_what_the_backend_batches(config: pb.ModelConfig) -> None:
    batches = [1] if config.backend == "python" else [1, contract.MAX_BATCH_SIZE]
    assert [warmup.batch_size for warmup in config.model_warmup] == batches
    for warmup in config.model_warmup:
        for tensor in config.input:
            image = warmup.inputs[tensor.name]
            assert (image.data_type, list(image.dims)) == (tensor.data_type, [*contract.GRID, 3])
            assert image.random_data


def test_no_request_waits_for_others_to_share_its_batch(config: pb.ModelConfig) -> None:
    assert config.dynamic_batching.max_queue_delay_microseconds == 0


def test_an_export_writes_the_network_for_cpu_and_gpu_and_its_description(tmp_path: Path) -> None:
    folder = repository.write_model(tmp_path, "flownet2_c", tiny_network("first"), DESCRIPTION)
    files = {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}
    assert {
        *repository.CONFIGURATIONS,
        "1/model.onnx",
        "1/model_fp16.onnx",
        "1/model.py",
        "1/golden.npz",
    } < files
    halves = onnx.load(folder / "1" / "model_fp16.onnx").graph.initializer
    assert [weight.data_type for weight in halves] == [TensorProto.FLOAT16]
    for file in repository.CONFIGURATIONS:
        text = (folder / file).read_text() + (folder / "1" / "description.pbtxt").read_text()
        parameters = parse(text).parameters
        assert {key: parameters[key].string_value for key in DESCRIPTION} == DESCRIPTION

    repository.write_model(tmp_path, "flownet2_c", tiny_network("again"), DESCRIPTION)
    assert {str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file()} == files
    assert onnx.load(folder / "1" / "model.onnx").producer_name == "again"


def test_an_export_into_the_repository_changes_no_file_that_git_tracks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracked = ["ls-files", "-z", "model_repository", ".gitignore"]
    done = subprocess.run(["git", *tracked], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip("this is no checkout")
    for file in done.stdout.rstrip("\0").split("\0"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_bytes((ROOT / file).read_bytes())

    def git(*arguments: str) -> str:
        command = ["git", "-c", "user.name=test", "-c", "user.email=test@localhost", *arguments]
        return subprocess.run(
            command, cwd=tmp_path, capture_output=True, text=True, check=True
        ).stdout

    git("init")
    git("add", ".")
    git("commit", "--message", "tracked")
    monkeypatch.setattr(repository, "TEMPLATE", tmp_path / "model_repository" / "flownet2")
    for name in ("flownet2", "flownet2_c"):
        repository.write_model(
            tmp_path / "model_repository", name, tiny_network("own"), DESCRIPTION
        )
    assert git("status", "--porcelain", "--untracked-files=no") == ""
    assert "model.onnx" not in git("status", "--porcelain", "--untracked-files=all")

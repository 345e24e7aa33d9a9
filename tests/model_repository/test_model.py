"""The model inside a real Triton: requests, engines, log and metrics."""

import re
import shutil
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import tritonclient.grpc
import tritonclient.http

from export.served.engines import PROVIDER_VARIABLE
from launch import triton, wheel
from launch.errors import LaunchError
from tests.support.gateway_stack import wait_until
from tests.support.pairs import Images, end_point_error, expected, pair
from tests.support.stack import Stack

SIZES = [(512, 512), (388, 584), (75, 100), (16, 16)]


@pytest.fixture(scope="module")
def grpc_client(stack: Stack) -> Iterator[tritonclient.grpc.InferenceServerClient]:
    url = f"127.0.0.1:{stack.ports['TRITON_GRPC_PORT']}"
    with tritonclient.grpc.InferenceServerClient(url) as client:
        yield client


def infer(client: Any, module: Any, images: tuple[Images, Images], **options: Any) -> Any:
    inputs = []
    for name, image in zip(("image1", "image2"), images, strict=True):
        tensor = module.InferInput(name, list(image.shape), "UINT8")
        tensor.set_data_from_numpy(image)
        inputs.append(tensor)
    return client.infer("flownet2", inputs, **options).as_numpy("flow")


@pytest.mark.parametrize("size", SIZES)
def test_grpc_serves_numpy_arrays_at_their_own_size(
    grpc_client: tritonclient.grpc.InferenceServerClient,
    reference: onnxruntime.InferenceSession,
    size: tuple[int, int],
) -> None:
    images = pair(*size, seed=1)
    want = expected(reference, images)
    got = infer(grpc_client, tritonclient.grpc, images)
    assert (got.dtype, got.shape) == (np.float32, want.shape)
    error = end_point_error(got, want).mean()
    assert error < 0.02 * np.linalg.norm(want, axis=-1).mean()


def test_http_serves_what_grpc_serves(
    stack: Stack, grpc_client: tritonclient.grpc.InferenceServerClient
) -> None:
    images = pair(75, 100, batch=2)
    url = f"127.0.0.1:{stack.ports['TRITON_HTTP_PORT']}"
    with tritonclient.http.InferenceServerClient(url) as client:
        over_http = infer(client, tritonclient.http, images)
    np.testing.assert_array_equal(over_http, infer(grpc_client, tritonclient.grpc, images))


def test_batch_that_triton_forms_runs_as_one(
    grpc_client: tritonclient.grpc.InferenceServerClient,
) -> None:
    """Concurrent requests of one shape share executions, and each gets its own flow."""
    requests = [pair(64, 128, seed) for seed in range(12)]
    alone = [infer(grpc_client, tritonclient.grpc, images) for images in requests]
    before = joined(grpc_client)
    # A large request keeps the only instance busy while the small ones gather.
    with ThreadPoolExecutor(len(requests) + 1) as threads:
        busy = threads.submit(infer, grpc_client, tritonclient.grpc, pair(512, 512, batch=4))
        together = list(
            threads.map(lambda images: infer(grpc_client, tritonclient.grpc, images), requests)
        )
        busy.result()
    wait_until(lambda: joined(grpc_client) - before >= len(requests) // 2 + 3)
    for one, other in zip(alone, together, strict=True):
        np.testing.assert_array_equal(one, other)


def joined(client: tritonclient.grpc.InferenceServerClient) -> int:
    """Inferences that shared an execution with an earlier one; Triton counts them a moment late."""
    (model,) = client.get_inference_statistics("flownet2").model_stats
    return int(model.inference_count - model.execution_count)


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        (((64, 64), (64, 65)), "differ in size: 64x64 and 65x64"),
        (((15, 64), (15, 64)), "images of 64x15 are too small: 16x16 at least"),
        (((64, 15), (64, 15)), "images of 15x64 are too small"),
    ],
)
def test_images_off_the_contract_are_refused(
    grpc_client: tritonclient.grpc.InferenceServerClient,
    sizes: tuple[tuple[int, int], tuple[int, int]],
    words: str,
) -> None:
    first, second = (np.zeros((1, *size, 3), np.uint8) for size in sizes)
    with pytest.raises(tritonclient.grpc.InferenceServerException, match=words) as refused:
        infer(grpc_client, tritonclient.grpc, (first, second))
    assert refused.value.status() == "StatusCode.INVALID_ARGUMENT"


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ((1, 2**62, 4, 3), 0),
        ((1, 2**61, 8, 3), 0),
        ((1, 2**8, 2**56 + 1, 3), 3 * 2**8),
        ((1, 0, 64, 3), 0),
    ],
)
def test_shape_that_cannot_be_is_refused(
    grpc_client: tritonclient.grpc.InferenceServerClient, shape: tuple[int, ...], size: int
) -> None:
    """Triton accepts it if its number of bytes modulo 2**64 equals the size of the content."""
    inputs = []
    for name in ("image1", "image2"):
        inputs.append(tritonclient.grpc.InferInput(name, list(shape), "UINT8"))
        inputs[-1]._raw_content = bytes(size)
    with pytest.raises(tritonclient.grpc.InferenceServerException, match="are too") as refused:
        grpc_client.infer("flownet2", inputs)
    assert refused.value.status() == "StatusCode.INVALID_ARGUMENT"
    images = pair(64, 64)
    assert infer(grpc_client, tritonclient.grpc, images).shape == (1, 64, 64, 2)


def test_bad_request_does_not_spoil_its_batch(
    grpc_client: tritonclient.grpc.InferenceServerClient,
) -> None:
    good = pair(64, 64)
    want = infer(grpc_client, tritonclient.grpc, good)
    bad = (np.zeros((1, 64, 64, 3), np.uint8), np.zeros((1, 64, 80, 3), np.uint8))
    with ThreadPoolExecutor(9) as threads:
        busy = threads.submit(infer, grpc_client, tritonclient.grpc, pair(512, 512))
        refused = threads.submit(infer, grpc_client, tritonclient.grpc, bad)
        flows = list(threads.map(lambda _: infer(grpc_client, tritonclient.grpc, good), range(6)))
        busy.result()
    assert isinstance(refused.exception(), tritonclient.grpc.InferenceServerException)
    for flow in flows:
        np.testing.assert_array_equal(flow, want)


def test_same_pair_gets_the_same_flow_alone_and_under_load(
    grpc_client: tritonclient.grpc.InferenceServerClient,
) -> None:
    """From the first request of its shape, which no other test uses."""
    images = pair(150, 210)
    flows = [infer(grpc_client, tritonclient.grpc, images) for _ in range(4)]
    others = [pair(64 + 16 * (n % 5), 96 + 32 * (n % 3), seed=n) for n in range(30)]
    with ThreadPoolExecutor(6) as threads:
        load = threads.map(lambda other: infer(grpc_client, tritonclient.grpc, other), others)
        for _ in range(8):
            flows.append(infer(grpc_client, tritonclient.grpc, images))
        assert all(np.isfinite(flow).all() for flow in load)
    assert {flow.tobytes() for flow in flows} == {flows[0].tobytes()}


ENGINE = re.compile(
    r'flownet2_golden_difference_px{device="(.*?)",engine="(.*?)",model="(.*?)",'
    r'precision="(.*?)",version="1"} (\S+)'
)


def engine_of(server: triton.Triton) -> tuple[str, str, float]:
    """Return the engine, its precision and the golden difference by Triton's metrics."""
    with urllib.request.urlopen(server.address.metrics) as response:
        (found,) = ENGINE.findall(response.read().decode())
    device, engine, model, precision, difference = found
    assert (device, model) == ("cpu", "flownet2")
    return engine.split()[0], precision, float(difference)


@pytest.fixture
def repository(shipped: Path, tmp_path: Path) -> Path:
    """A copy of the shipped model's repository."""
    return shutil.copytree(shipped, tmp_path / "models")


@pytest.fixture
def cuda_stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """The GPU's engine runs on ONNX Runtime's CPU provider."""
    monkeypatch.setenv(PROVIDER_VARIABLE, "CPUExecutionProvider")


@pytest.mark.usefixtures("cuda_stand_in")
def test_gpu_engine_serves_shapes_in_turn_and_batches(
    repository: Path, reference: onnxruntime.InferenceSession
) -> None:
    with (
        wheel.serve(repository) as server,
        tritonclient.grpc.InferenceServerClient(server.address.grpc) as client,
    ):
        engine, precision, difference = engine_of(server)
        assert (engine, precision) == ("ONNX", "fp16")
        assert 0 < difference < 0.01
        for _ in range(4):  # at the third request a shape gets a session of its own
            for shape in ((64, 128, 1), (64, 64, 7), (640, 600, 2)):
                images = pair(*shape[:2], batch=shape[2])
                flow = infer(client, tritonclient.grpc, images)
                want = expected(reference, images)
                assert flow.shape == want.shape
                assert end_point_error(flow, want).mean() < 0.02


def change_weights(version: Path) -> None:
    """Give the GPU's engine other weights, so that its flow is wrong, as with a faulty kernel."""
    model = onnx.load(version / "model_fp16.onnx")
    tensor = max(model.graph.initializer, key=lambda tensor: len(tensor.raw_data))
    tensor.raw_data = np.negative(np.frombuffer(tensor.raw_data, np.float16)).tobytes()
    onnx.save(model, version / "model_fp16.onnx")


def crash(version: Path) -> None:
    """Let the GPU's engine crash, like a library that does not match the driver."""
    with (version / "onnxruntime_engine.py").open("a") as module:
        module.write("\nimport os, signal\nos.kill(os.getpid(), signal.SIGSEGV)\n")


@pytest.mark.usefixtures("cuda_stand_in")
@pytest.mark.parametrize(
    ("fault", "words"),
    [(change_weights, "its flow of the golden pair"), (crash, "it crashes (Segmentation fault)")],
)
def test_faulty_gpu_engine_is_not_used(
    repository: Path,
    reference: onnxruntime.InferenceSession,
    fault: Callable[[Path], None],
    words: str,
) -> None:
    fault(repository / "flownet2" / "1")
    lines: list[str] = []
    with (
        wheel.serve(repository, echo=lines.append) as server,
        tritonclient.grpc.InferenceServerClient(server.address.grpc) as client,
    ):
        assert engine_of(server)[0] == "OpenVINO"
        images = pair(75, 100)
        error = end_point_error(
            infer(client, tritonclient.grpc, images), expected(reference, images)
        )
        assert error.mean() < 0.03
    assert any(f"flownet2: ONNX Runtime is not used: {words}" in line for line in lines)


def test_model_that_no_engine_runs_right_is_not_loaded_and_the_old_one_serves_on(
    repository: Path,
) -> None:
    golden = repository / "flownet2" / "1" / "golden.npz"
    images = pair(75, 100)
    with (
        wheel.serve(repository) as server,
        tritonclient.grpc.InferenceServerClient(server.address.grpc) as client,
    ):
        before = infer(client, tritonclient.grpc, images), engine_of(server)
        with np.load(golden) as arrays:
            np.savez(golden, **{**arrays, "flow": arrays["flow"] + 1})
        with pytest.raises(LaunchError, match="no engine can run this model"):
            server.reload()
        np.testing.assert_array_equal(infer(client, tritonclient.grpc, images), before[0])
        assert engine_of(server) == before[1]

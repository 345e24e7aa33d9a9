"""The CPU model: its engine against ONNX Runtime, and itself inside a real Triton."""

import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import openvino
import pytest
import tritonclient.grpc
import tritonclient.http
from PIL import Image

from export.served import openvino_engine
from export.served.bfloat16 import cast_to_bfloat16
from export.served.openvino_engine import Engine, available_cores, has_bfloat16
from export.shipped import write_shipped
from tests.support.exported import Exported
from tests.support.gateway_stack import wait_until
from tests.support.stack import Stack

# Sizes that need no, some and much padding to multiples of 64; landscape and portrait.
SIZES = [(512, 512), (388, 584), (75, 100), (100, 75), (16, 16)]

needs_bfloat16 = pytest.mark.skipif(
    not has_bfloat16(), reason="this CPU has no bfloat16 arithmetic"
)

Images = npt.NDArray[np.uint8]


@pytest.fixture(scope="module")
def onnx_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The network that ships: C, a warp, S, every kind of part that the big networks repeat."""
    folder = tmp_path_factory.mktemp("repository")
    write_shipped(folder)
    return folder / "flownet2" / "1" / "model.onnx"


@pytest.fixture(scope="module")
def reference(onnx_file: Path) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(onnx_file, providers=["CPUExecutionProvider"])


def pair(height: int, width: int, seed: int = 0, batch: int = 1) -> tuple[Images, Images]:
    """Smooth random images, the second a shifted first."""
    random = np.random.default_rng(seed)
    small = random.integers(0, 256, (batch, height // 8 + 3, width // 8 + 3, 3), np.uint8)
    large = np.stack(
        [
            np.asarray(Image.fromarray(one).resize((width + 8, height + 8), Image.BICUBIC))
            for one in small
        ]
    )
    return large[:, 2:-6, 5:-3].copy(), large[:, 4:-4, 2:-6].copy()


def expected(session: onnxruntime.InferenceSession, images: tuple[Images, Images]) -> Any:
    return session.run(None, {"image1": images[0], "image2": images[1]})[0]


def end_point_error(one: Any, other: Any) -> Any:
    return np.linalg.norm(one - other, axis=-1)


@pytest.fixture(scope="module")
def engine_f32(onnx_file: Path) -> Engine:
    return Engine(onnx_file, "f32")


@pytest.fixture(scope="module")
def engine_bf16(onnx_file: Path) -> Engine:
    return Engine(onnx_file, "bf16")


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("size", SIZES)
def test_float32_engine_is_onnx_runtime(
    engine_f32: Engine,
    reference: onnxruntime.InferenceSession,
    size: tuple[int, int],
    batch: int,
) -> None:
    images = pair(*size, batch=batch)
    want = expected(reference, images)
    assert np.abs(want).max() > 1  # or the comparison says nothing
    got = engine_f32(*images)
    assert got.shape == (batch, *size, 2)
    assert np.abs(got - want).max() < 1e-3


@needs_bfloat16
@pytest.mark.parametrize("size", SIZES[:3])
def test_bfloat16_engine_stays_close(
    engine_bf16: Engine, reference: onnxruntime.InferenceSession, size: tuple[int, int]
) -> None:
    images = pair(*size)
    want = expected(reference, images)
    error = end_point_error(engine_bf16(*images), want).mean()
    assert 0 < error < 0.02 * np.linalg.norm(want, axis=-1).mean()


def test_narrow_images_run_in_float32(engine_f32: Engine, engine_bf16: Engine) -> None:
    """Where OpenVINO is wrong in bfloat16. (Its weights are rounded on every CPU.)"""
    narrow, wide = pair(128, 64), pair(64, 128)
    np.testing.assert_array_equal(engine_bf16(*narrow), engine_f32(*narrow))
    assert np.abs(engine_bf16(*wide) - engine_f32(*wide)).max() > 1e-3


def test_recurring_sizes_are_planned_within_the_memory(
    onnx_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(openvino_engine, "PIXEL_BYTES", 2**31 // 128**2 // 3)
    made = Engine(onnx_file, "f32")

    def ask(size: tuple[int, int]) -> set[tuple[int, ...]]:
        """Ask often enough for a plan; the shapes that are planned then."""
        images = pair(*size)
        first = made(*images)
        for _ in range(3):
            np.testing.assert_allclose(made(*images), first, atol=1e-3)
        if made._planning:
            made._planning[1].result()
        np.testing.assert_allclose(made(*images), first, atol=1e-3)
        return set(made._planned)

    made(*pair(512, 512))
    assert ask((64, 64)) == {(1, 512, 512, 3)}  # in use, and takes it all
    made._recent.clear()
    assert ask((64, 64)) == {(1, 64, 64, 3)}
    assert ask((64, 128)) == {(1, 64, 64, 3), (1, 64, 128, 3)}
    assert ask((128, 128)) == {(1, 64, 64, 3), (1, 64, 128, 3)}
    made._recent.clear()
    assert (1, 128, 128, 3) in ask((128, 128))


SWEEP = [
    *itertools.product((16, 64, 100, 128, 192, 320, 512), repeat=2),
    *((length, side) for length in (8192, 16384) for side in (16, 64, 128)),
    *((side, length) for length in (8192, 16384) for side in (16, 64, 128)),
]


@pytest.mark.long
@pytest.mark.parametrize(
    ("precision", "limit"), [("f32", 1e-3), pytest.param("bf16", 0.02, marks=needs_bfloat16)]
)
def test_every_network_is_right_at_every_size(
    exported: Exported, precision: str, limit: float
) -> None:
    """Against ONNX Runtime, which runs float32; twice, which must be the same."""
    if exported.half:
        pytest.skip("the CPU serves float32 files")
    engine = Engine(exported.file, precision)
    session = onnxruntime.InferenceSession(exported.file, providers=["CPUExecutionProvider"])
    for size in SWEEP:
        image1, image2 = pair(*size)
        want = expected(session, (image1, image2))[0]
        one, other = engine(np.repeat(image1, 2, 0), np.repeat(image2, 2, 0))
        np.testing.assert_array_equal(one, other, err_msg=str(size))
        error = end_point_error(one, want).mean() / np.linalg.norm(want, axis=-1).mean()
        print(f"{exported.name} {precision} {size}: {error:.1e}")
        assert error < limit, size


def test_only_wide_convolutions_are_cast(onnx_file: Path) -> None:
    """Nothing that carries flow, coordinates or the cost volume may lose its mantissa."""
    inlined = onnx.inliner.inline_local_functions(onnx.load(onnx_file))
    model = openvino.Core().read_model(inlined.SerializeToString())
    cast_to_bfloat16(model)
    bfloat16 = [
        node
        for node in model.get_ordered_ops()
        if node.get_output_size() and node.get_output_element_type(0) == openvino.Type.bf16
    ]
    carriers = {"Interpolate", "GridSample", "Sqrt", "ReduceSum", "Subtract", "Floor", "Divide"}
    assert not carriers & {node.get_type_name() for node in bfloat16}
    # The products of the cost volume, one for each dy, compare features that are bfloat16 anyway.
    assert [node.get_type_name() for node in bfloat16].count("MatMul") == 21
    convolutions = [
        node
        for node in model.get_ordered_ops()
        if node.get_type_name() in {"Convolution", "ConvolutionBackpropData"}
    ]
    for node in convolutions:
        # conv1 and, in this thin network, conv2.
        reads_little = node.get_input_partial_shape(0)[1].get_length() <= 24
        predicts_flow = node.get_output_partial_shape(0)[1] == 2
        wide = not reads_little and not predicts_flow
        assert (node in bfloat16) == wide, node.get_friendly_name()
    # C: conv3 of both images, conv_redir, 7 of the tail; S: 8; 4 deconvolutions each.
    assert sum(node in bfloat16 for node in convolutions) == 2 + 1 + 7 + 4 + 8 + 4


def test_weights_are_rounded_to_the_nearest(onnx_file: Path) -> None:
    """OpenVINO's own conversion shrinks them, by half a unit on average."""
    inlined = onnx.inliner.inline_local_functions(onnx.load(onnx_file))
    nearest = {
        onnx.numpy_helper.to_array(tensor).astype(ml_dtypes.bfloat16).tobytes()
        for tensor in inlined.graph.initializer
    }
    model = openvino.Core().read_model(inlined.SerializeToString())
    cast_to_bfloat16(model)
    constants = [
        node.data
        for node in model.get_ordered_ops()
        if node.get_type_name() == "Constant" and node.get_element_type() == openvino.Type.bf16
    ]
    weights_and_biases = [data for data in constants if data.size > 1]
    assert len(weights_and_biases) >= 2 * (1 + 1 + 7 + 4 + 8 + 4)
    assert all(data.tobytes() in nearest for data in weights_and_biases)


@pytest.mark.parametrize(("flag", "precision"), [("avx512_bf16", "bf16"), ("avx512f", "f32")])
def test_bfloat16_is_chosen_where_the_cpu_has_it(
    onnx_file: Path, monkeypatch: pytest.MonkeyPatch, flag: str, precision: str
) -> None:
    """And weights are rounded to it there, and only there."""
    monkeypatch.setattr(Path, "read_text", lambda self, **options: f"flags : fpu sse2 {flag}")
    made = Engine(onnx_file)
    assert made.precision == precision
    monkeypatch.undo()
    images = pair(64, 128)
    same = np.array_equal(made(*images), Engine(onnx_file, "f32")(*images))
    assert same == (precision == "f32")


@pytest.mark.parametrize(
    ("quota", "cores"),
    [
        ("max 100000\n", 4),
        ("200000 100000\n", 2),
        ("150000 100000\n", 2),
        ("10000 100000\n", 1),
        ("900000 100000\n", 4),
        (None, 4),
    ],
)
def test_threads_follow_affinity_and_quota(
    monkeypatch: pytest.MonkeyPatch, quota: str | None, cores: int
) -> None:
    def read_text(path: Path, **options: object) -> str:
        assert str(path) == "/sys/fs/cgroup/cpu.max"
        if quota is None:
            raise FileNotFoundError(path)
        return quota

    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 1, 2, 5})
    monkeypatch.setattr(Path, "read_text", read_text)
    assert available_cores() == cores


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
        np.testing.assert_allclose(one, other, atol=1e-3 + 0.02 * np.abs(one).max())


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
    """Triton lets it pass where its number of bytes, modulo 2**64, is that of the content."""
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
        np.testing.assert_allclose(flow, want, atol=1e-3 + 0.02 * np.abs(want).max())

"""Networks of other projects under the contract: the wrapped graph, its checks, and Triton."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
import tritonclient.grpc

from export.__main__ import main
from export.proof import Memory, check, measure_memory
from export.wrap import LIKE, ImageInput, WrapError, wrap
from launch import wheel
from tests.support.foreign_networks import BIAS, WEIGHTS, write_network
from tests.support.pairs import Images, pair
from tests.support.tiny_network import tiny_network

NOTHING = np.zeros_like(WEIGHTS)
SIZES = [(16, 16), (75, 100), (128, 192)]


def run(model: onnx.ModelProto, images: tuple[Images, Images]) -> npt.NDArray[np.float32]:
    session = onnxruntime.InferenceSession(model.SerializeToString())
    flow: npt.NDArray[np.float32] = session.run(
        None, dict(zip(("image1", "image2"), images, strict=True))
    )[0]
    return flow


def reference(
    images: tuple[Images, Images], taken: ImageInput, size: tuple[int, int] | None = None
) -> npt.NDArray[np.float32]:
    """Prepare images, run the network and restore its flow, in PyTorch."""
    low, high = {"0..1": (0, 1), "0..255": (0, 255), "-1..1": (-1, 1)}[taken.range]
    height, width = images[0].shape[1:3]
    fitted = size or tuple(
        max(-(-side // taken.multiple) * taken.multiple, taken.least) for side in (height, width)
    )
    top, left = ((new - old) // 2 for new, old in zip(fitted, (height, width), strict=True))
    bottom, right = fitted[0] - height - top, fitted[1] - width - left
    resized = taken.fit == "resize" or size
    ready = []
    for image in images:
        x = torch.from_numpy(image[..., ::-1].copy() if taken.bgr else image)
        x = x.double().permute(0, 3, 1, 2) / 255 * (high - low) + low
        x = (x - torch.tensor(taken.mean).view(3, 1, 1)) / torch.tensor(taken.std).view(3, 1, 1)
        if resized:
            x = F.interpolate(x, fitted, mode="bilinear", align_corners=False)
        else:
            x = F.pad(x, (left, right, top, bottom), mode="replicate")
        ready.append(x)
    weights, bias = (torch.from_numpy(x).double() for x in (WEIGHTS, BIAS))
    flow = F.conv2d(torch.cat(ready, 1), weights, bias, padding=1)
    if resized:
        flow = F.interpolate(flow, (height, width), mode="bilinear", align_corners=False)
        ratio = [width / fitted[1], height / fitted[0]]
        flow = flow * torch.tensor(ratio).view(2, 1, 1)
    else:
        flow = flow[:, :, top : top + height, left : left + width]
    return flow.permute(0, 2, 3, 1).numpy()


@pytest.mark.parametrize(
    "taken",
    [
        *LIKE.values(),
        ImageInput("0..255", (1.0, 2.0, 3.0), (4.0, 5.0, 6.0), bgr=True, multiple=24, least=48),
        ImageInput("-1..1", multiple=1, least=1),
    ],
)
@pytest.mark.parametrize("size", SIZES)
def test_images_are_prepared_and_flow_restored(
    taken: ImageInput, size: tuple[int, int], tmp_path: Path
) -> None:
    wrapped = wrap(write_network(tmp_path / "a.onnx"), taken)
    images = pair(*size, batch=2)
    np.testing.assert_allclose(
        run(wrapped.model, images), reference(images, taken), atol=2e-3, rtol=1e-4
    )
    assert wrapped.size is None
    assert wrapped.parameters == WEIGHTS.size + BIAS.size


@pytest.mark.parametrize("options", [{"inputs": "channels"}, {"inputs": "frames"}, {"batch": 1}])
def test_the_contracts_inputs_and_output(options: dict[str, Any], tmp_path: Path) -> None:
    model = wrap(write_network(tmp_path / "a.onnx", **options), ImageInput()).model
    onnx.checker.check_model(model, full_check=True)
    contract = tiny_network()
    assert list(model.graph.input) == list(contract.graph.input)
    assert list(model.graph.output) == list(contract.graph.output)
    images = pair(75, 100)
    expected = reference(images, ImageInput())
    np.testing.assert_allclose(run(model, images), expected, atol=2e-2, rtol=1e-4)


def test_half_precision_inputs_are_cast(tmp_path: Path) -> None:
    taken = ImageInput("0..1")
    model = wrap(write_network(tmp_path / "a.onnx", tensor="float16"), taken).model
    images = pair(64, 64)
    flow = run(model, images)
    assert flow.dtype == np.float32
    np.testing.assert_allclose(flow, reference(images, taken), atol=0.01)


def test_a_fixed_size_is_resized_to(tmp_path: Path) -> None:
    wrapped = wrap(write_network(tmp_path / "a.onnx", size=(96, 160)), ImageInput())
    assert wrapped.size == (96, 160)
    for size in SIZES:
        images = pair(*size)
        expected = reference(images, ImageInput(), (96, 160))
        np.testing.assert_allclose(run(wrapped.model, images), expected, atol=2e-2, rtol=1e-3)


@pytest.mark.parametrize(("opset", "becomes"), [(16, 18), (18, 18), (19, 19), (20, 19)])
def test_opset_is_one_that_every_engine_reads(opset: int, becomes: int, tmp_path: Path) -> None:
    model = wrap(write_network(tmp_path / "a.onnx", opset=opset), ImageInput()).model
    assert {o.domain: o.version for o in model.opset_import} == {"": becomes}


@pytest.mark.parametrize(
    ("options", "output", "message"),
    [
        ({"second_output": True}, None, "name the output .* coarse .* flow"),
        ({}, "other", "name the output"),
        ({"tensor": "double"}, None, "needs two float images"),
    ],
)
def test_what_is_no_such_network_is_named(
    options: dict[str, Any], output: str | None, message: str, tmp_path: Path
) -> None:
    path = write_network(tmp_path / "a.onnx", **options)
    with pytest.raises(WrapError, match=message):
        wrap(path, ImageInput(), output)


def test_a_file_that_is_not_onnx_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.onnx").write_bytes(b"hello, world")
    with pytest.raises(WrapError, match=r"a\.onnx: not an ONNX file"):
        wrap(tmp_path / "a.onnx", ImageInput())


def test_one_output_of_several_can_be_named(tmp_path: Path) -> None:
    path = write_network(tmp_path / "a.onnx", second_output=True)
    model = wrap(path, ImageInput(), "coarse").model
    assert [value.name for value in model.graph.output] == ["flow"]


def checked(path: Path, **options: Any) -> tuple[bool, list[str]]:
    wrapped = wrap(path, ImageInput("0..1"), **options)
    file = path.with_name("wrapped.onnx")
    onnx.save(wrapped.model, file)
    return check(file, any_size=wrapped.size is None)


def test_a_right_network_passes_the_checks(tmp_path: Path) -> None:
    assert checked(write_network(tmp_path / "a.onnx", weights=NOTHING)) == (True, [])


def test_a_network_that_is_dynamic_by_name_only_is_refused(tmp_path: Path) -> None:
    path = write_network(tmp_path / "a.onnx", weights=NOTHING, baked_width=256)
    with pytest.raises(WrapError, match=r"differs by .* px between images of .* --size"):
        checked(path)
    batches, _ = checked(path, size=(192, 256))
    assert batches


def test_a_batch_of_one_is_found(tmp_path: Path) -> None:
    batches, warnings = checked(write_network(tmp_path / "a.onnx", weights=NOTHING, batch=1))
    assert not batches
    assert any("pair by pair" in warning for warning in warnings)


def test_flow_that_misses_a_known_shift_is_warned_of(tmp_path: Path) -> None:
    _, warnings = checked(write_network(tmp_path / "a.onnx", weights=WEIGHTS * 5))
    assert any("check the range" in warning for warning in warnings)


def test_flow_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WrapError, match="not finite"):
        checked(write_network(tmp_path / "a.onnx", weights=NOTHING * np.nan))


def test_the_pixel_limit_follows_from_the_measured_memory(tmp_path: Path) -> None:
    assert Memory(2**31, 0, 2**31 / 1024**4).max_pixels() == 1024**2
    assert Memory(0, 2**32 / 1024**2, 0).max_pixels() == 1024**2
    assert Memory(2**33, 0, 0).max_pixels() == 0
    model = wrap(write_network(tmp_path / "a.onnx"), ImageInput()).model
    onnx.save(model, tmp_path / "wrapped.onnx")
    memory = measure_memory(tmp_path / "wrapped.onnx")
    # At least the images and the network's input as float32.
    assert 4 * 6 * 2 <= memory.linear + memory.square * 768**2 < 1000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--onnx", "a.onnx", "--license", "MIT"], "--onnx needs --name and --license"),
        (["--onnx", "a.onnx", "--name", "b"], "--onnx needs --name and --license"),
        (["--onnx", "a.onnx", "--license", "MIT", "--name", "flownet2"], "choose another name"),
        (["--network", "FlowNet2-s"], "--network needs --weights"),
    ],
)
def test_options_that_are_missing_are_named(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*arguments, "--repository", "models"])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_two_networks_are_served_beside_each_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A dynamic one, and one of fixed size and batch, through a real Triton."""
    models = tmp_path / "models"
    dynamic = write_network(tmp_path / "any_size.onnx", weights=WEIGHTS / 100)
    fixed = write_network(tmp_path / "fixed.onnx", weights=WEIGHTS / 100, size=(128, 192), batch=1)
    for path, like in ((dynamic, "raft"), (fixed, "gmflow")):
        arguments = ["--onnx", str(path), "--like", like, "--name", path.stem, "--license", "MIT"]
        assert main([*arguments, "--repository", str(models)]) == 0
    output = capsys.readouterr()
    assert "computes at 192x128 only" in output.err
    assert f"{models / 'fixed'}, for images of up to" in output.out

    description = models / "any_size" / "1" / "description.pbtxt"
    text = description.read_text(encoding="utf-8")
    assert '"network" value { string_value: "any_size" }' in text
    assert '"weights_license" value { string_value: "MIT" }' in text
    lines = [line for line in text.splitlines(keepends=True) if "max_pixels" not in line]
    limit = 'parameters { key: "max_pixels" value { string_value: "262144" } }\n'
    description.write_text("".join(lines) + limit, encoding="utf-8")
    assert not (description.parent / "model_fp16.onnx").exists()

    with (
        wheel.serve(models) as server,
        tritonclient.grpc.InferenceServerClient(server.address.grpc) as client,
    ):

        def infer(model: str, images: tuple[Images, Images]) -> Any:
            inputs = []
            for name, image in zip(("image1", "image2"), images, strict=True):
                inputs.append(tritonclient.grpc.InferInput(name, image.shape, "UINT8"))
                inputs[-1].set_data_from_numpy(image)
            return client.infer(model, inputs).as_numpy("flow")

        for size, batch in (((16, 16), 1), ((75, 100), 3), ((256, 256), 1)):
            images = pair(*size, batch=batch)
            for path in (dynamic, fixed):
                session = onnxruntime.InferenceSession(models / path.stem / "1" / "model.onnx")
                expected = np.concatenate(
                    [
                        session.run(None, {"image1": first[None], "image2": second[None]})[0]
                        for first, second in zip(*images, strict=True)
                    ]
                )
                np.testing.assert_allclose(infer(path.stem, images), expected, atol=1e-4)
        with pytest.raises(tritonclient.grpc.InferenceServerException, match="262144 is the most"):
            infer("any_size", pair(512, 513))

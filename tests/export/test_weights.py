"""Weight files of every format, written here and read back."""

import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from export.networks import NETWORKS, FlowNet2, Semantics
from export.weights import (
    WeightsError,
    load_weights,
    save_weights,
)
from tests.support.caffe_reference import Blobs, make_blobs, write_h5

THIN_C = NETWORKS["FlowNet2-c"]


def varint(number: int) -> bytes:
    """Seven bits a byte, lowest first; the eighth says that more follow."""
    return bytes([number & 127 | 128]) + varint(number >> 7) if number > 127 else bytes([number])


def field(number: int, payload: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(payload)) + payload


def write_caffemodel(path: Path, blobs: Blobs, legacy: bool = False) -> Path:
    """The protobuf wire format by hand: ``legacy`` is V1LayerParameter with four-axis shapes."""
    net = field(1, b"net")
    for layer, values in blobs.items():
        body = field(4 if legacy else 1, layer.encode())
        for value in values:
            blob = field(5, value.astype("<f4").tobytes())
            if legacy:
                axes = (1,) * (4 - value.ndim) + value.shape
                blob += b"".join(varint(i << 3) + varint(size) for i, size in enumerate(axes, 1))
            else:
                blob += field(7, field(1, b"".join(map(varint, value.shape))))
            body += field(6 if legacy else 7, blob)
        net += field(2 if legacy else 100, body)
    path.write_bytes(net)
    return path


def parameters(model: FlowNet2) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in model.named_parameters()}


def test_the_three_caffe_formats_hold_the_same(tmp_path: Path) -> None:
    blobs = make_blobs(["c", "s"], 3 / 8)
    network = NETWORKS["FlowNet2-cs"]
    hdf5, _ = load_weights(network, write_h5(tmp_path / "a.caffemodel.h5", blobs))
    binary, _ = load_weights(network, write_caffemodel(tmp_path / "a.caffemodel", blobs))
    legacy, _ = load_weights(network, write_caffemodel(tmp_path / "b.caffemodel", blobs, True))
    for model in (hdf5, binary, legacy):
        assert model.semantics.mean == "stored"
        np.testing.assert_array_equal(model.mean1.flatten(), np.float32([0.41, 0.43, 0.45]))
        np.testing.assert_array_equal(model.mean2.flatten(), np.float32([0.40, 0.44, 0.46]))
        first = model.get_submodule("blocks.net1.stem.conv1").weight
        np.testing.assert_array_equal(first.detach(), blobs["conv1"][0])
        upflow = model.get_submodule("blocks.net2.decoder.upflow5").bias
        np.testing.assert_array_equal(upflow.detach(), blobs["net2_net2_upsample_flow6to5"][1])
        assert all(
            torch.equal(a, b)
            for a, b in zip(parameters(model).values(), parameters(hdf5).values(), strict=True)
        )


def test_safetensors_round_trip(tmp_path: Path) -> None:
    model, _ = load_weights(THIN_C, write_h5(tmp_path / "c.h5", make_blobs(["c"], 3 / 8)))
    save_weights(model, tmp_path / "c.safetensors", source="a test", license="GPL-3.0-or-later")
    again, file = load_weights(THIN_C, tmp_path / "c.safetensors")
    assert (file.source, file.license) == ("a test", "GPL-3.0-or-later")
    assert torch.equal(again.mean1, model.mean1)
    for name, value in parameters(model).items():
        assert torch.equal(parameters(again)[name], value.half().float()), name


def test_pair_mean_is_of_both_images_together() -> None:
    model = FlowNet2(THIN_C, Semantics(mean="pair"))
    first, second = torch.randint(0, 256, (2, 2, 64, 64, 3), dtype=torch.uint8)
    a, b = model.normalise(first, second)
    mean = np.stack([first, second], axis=1).reshape(2, -1, 3).mean(1)[:, ::-1] / 255
    subtracted = (first / 255.0).numpy()[..., ::-1] - a.permute(0, 2, 3, 1).numpy()
    expected = np.broadcast_to(mean[:, None, None], first.shape)
    np.testing.assert_allclose(subtracted, expected, atol=1e-6)
    assert abs(float(torch.cat((a, b), 3).mean())) < 1e-6


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda b: b.pop("conv4_1"), "layer conv4_1 is missing; it looks like FlowNet2-c"),
        (
            lambda b: b.update(conv9=[np.zeros((1, 1, 3, 3), "f")]),
            "layer conv9 is left over; it looks like FlowNet2-c",
        ),
        (
            lambda b: b.update(conv3=[np.zeros((96, 48, 3, 3), "f"), b["conv3"][1]]),
            "layer conv3 has shape 96x48x3x3, not 96x48x5x5",
        ),
        (
            lambda b: b.update(conv3=[b["conv3"][0], np.zeros(1, "f")]),
            "the bias of layer conv3 has shape 1, not 96",
        ),
        (lambda b: b.pop("img1s_aug"), "layer img1s_aug with the per-channel mean"),
    ],
)
def test_what_is_wrong_is_named(spoil, message: str, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    blobs = make_blobs(["c"], 3 / 8)
    spoil(blobs)
    with pytest.raises(WeightsError, match=message) as caught:
        load_weights(THIN_C, write_h5(tmp_path / "c.caffemodel.h5", blobs))
    assert "\n" not in str(caught.value)


def test_the_network_that_a_file_holds_is_named(tmp_path: Path) -> None:
    path = write_h5(tmp_path / "FlowNet2.caffemodel.h5", make_blobs(["c", "s"], 3 / 8))
    with pytest.raises(WeightsError, match=r"looks like FlowNet2-cs$"):
        load_weights(NETWORKS["FlowNet2"], path)


@pytest.mark.parametrize("mean", ["[0.5]", '"half"', "{}", "[0.5, 0.5"])
def test_means_that_are_not_three_numbers_are_named(mean: str, tmp_path: Path) -> None:
    metadata = {"mean1": mean, "mean2": mean, "source": "a test", "license": "none"}
    save_file({"net1.conv1.weight": torch.zeros(24, 3, 7, 7)}, tmp_path / "c", metadata)
    with pytest.raises(WeightsError, match="c: safetensors without our metadata"):
        load_weights(THIN_C, tmp_path / "c")


class Exploit:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (open, ("executed", "w"))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x89HDF\r\n\x1a\n broken",
        b"PK\x03\x04 broken",
        b"\x80\x02 broken",
        struct.pack("<Q", 40) + b"{broken",
        b"\xff" * 100,
        b"hello, world",
        pickle.dumps({"state_dict": Exploit()}, protocol=2),
    ],
)
def test_broken_files_are_refused_and_nothing_runs(
    content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "weights"
    path.write_bytes(content)
    with pytest.raises(WeightsError, match="weights"):
        load_weights(THIN_C, path)
    assert not (tmp_path / "executed").exists()


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="No such file"):
        load_weights(THIN_C, tmp_path / "none.caffemodel")


def test_truncated_caffemodel(tmp_path: Path) -> None:
    path = write_caffemodel(tmp_path / "c.caffemodel", make_blobs(["c"], 3 / 8))
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(WeightsError):
        load_weights(THIN_C, path)

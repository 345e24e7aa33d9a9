"""Checkpoints of other projects, against a reference with each project's input and operators."""

import io
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from export.networks import NETWORKS
from export.weights import WeightsError, load_weights
from tests.export.test_networks import NETS, images
from tests.support.caffe_reference import Blobs, Options, make_blobs, run
from tests.support.checkpoints import checkpoint, mmflow, nvidia

MMFLOW = Options(mean=(0, 0, 0), summed=True, sd_unit=20, edge=True, aligned=False)
PINARD = Options(rgb=True, mean=(0.411, 0.432, 0.45), resized=False)
SIZE = (75, 100)

CASES: dict[str, tuple[str, Callable[[list[str], Blobs], dict[str, Any]], Options, str, str]] = {
    "mmflow-s": (
        "FlowNet2-s",
        lambda nets, blobs: checkpoint(mmflow(nets, blobs), meta={"epoch": 1}),
        MMFLOW,
        "mmflow: BGR, no mean, summed correlation, edge warp, unaligned upsampling",
        "Apache-2.0",
    ),
    "mmflow-c": (
        "FlowNet2-c",
        lambda nets, blobs: checkpoint(mmflow(nets, blobs), meta={"epoch": 1}),
        MMFLOW,
        "mmflow:",
        "Apache-2.0",
    ),
    "mmflow-css": (
        "FlowNet2-css",
        lambda nets, blobs: checkpoint(mmflow(nets, blobs), "module."),
        MMFLOW,
        "mmflow:",
        "Apache-2.0",
    ),
    "mmflow-sd": (
        "FlowNet2-SD",
        mmflow,  # without `state_dict`
        MMFLOW,
        "mmflow:",
        "Apache-2.0",
    ),
    "mmflow-flownet2": (
        "FlowNet2",
        lambda nets, blobs: checkpoint(mmflow(nets, blobs)),
        MMFLOW,
        "mmflow:",
        "Apache-2.0",
    ),
    "ptlflow": (
        "FlowNet2-cs",
        lambda nets, blobs: checkpoint(
            nvidia(nets, blobs), "model.", **{"pytorch-lightning_version": "2.4"}
        ),
        Options(rgb=True, mean="image"),
        "ptlflow: RGB, mean of each image",
        "research only",
    ),
    "flownetpytorch-s": (
        "FlowNet2-s",
        lambda nets, blobs: checkpoint(
            nvidia(nets, blobs, biases=False), arch="flownets", div_flow=20
        ),
        PINARD,
        "FlowNetPytorch: RGB, mean (0.45, 0.432, 0.411) (BGR), no resizing",
        "MIT",
    ),
    "flownetpytorch-c-bn": (
        "FlowNet2-c",
        lambda nets, blobs: checkpoint(
            nvidia(nets, blobs, biases=False, norm="conv3_1"), arch="flownetc_bn", div_flow=10.0
        ),
        Options(rgb=True, mean=(0.411, 0.432, 0.45), resized=False, unit=10),
        "FlowNetPytorch: RGB",
        "MIT",
    ),
    "flownets_from_caffe": (
        "FlowNet2-s",
        lambda nets, blobs: nvidia(nets, blobs, biases=False),
        Options(mean=(0.411, 0.432, 0.45), resized=False),
        "FlowNetPytorch, from Caffe: BGR, mean (0.411, 0.432, 0.45) (BGR), no resizing",
        "research only",
    ),
    "nvidia": (
        "FlowNet2-cs",
        lambda nets, blobs: checkpoint(
            nvidia(nets, blobs, norm="conv3_1"), arch="FlowNet2CS", best_EPE=1e10
        ),
        Options(rgb=True, mean="pair"),
        "NVIDIA/flownet2-pytorch: RGB, mean of the pair",
        "research only",
    ),
}


@pytest.mark.parametrize(("case", "legacy"), [*((case, False) for case in CASES), ("nvidia", True)])
def test_checkpoint(case: str, legacy: bool, tmp_path: Path) -> None:
    """`legacy`: as PyTorch before 1.6 wrote files."""
    name, write, options, description, license = CASES[case]
    nets, width = NETS[name]
    blobs = make_blobs(nets, width)
    path = tmp_path / f"{case}.pth.tar"
    content = write(nets, blobs)  # zeroes biases in `blobs` that the project does not have
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    model, file = load_weights(NETWORKS[name], path)
    assert file.description.startswith(description)
    assert file.license.startswith(license)
    assert case in file.source
    first, second = images(*SIZE)
    with torch.inference_mode():
        flow = model(torch.from_numpy(first), torch.from_numpy(second)).numpy()
    expected = run(nets, blobs, first, second, options)
    scale = np.linalg.norm(expected, axis=-1).mean()
    assert scale > 1e-3
    error = np.linalg.norm(flow - expected, axis=-1)
    # Caffe's warp is zero outside the image: rounding decides at the very border.
    assert np.quantile(error, 0.999 if options.edge is False else 1) < 1e-4 * max(scale, 1)
    assert error.mean() < 1e-5 * max(scale, 1)
    assert error.mean() < 1e-4 * scale


def tar(path: Path) -> None:
    with tarfile.open(path, "w:gz") as archive:
        archive.addfile(tarfile.TarInfo("models/a.caffemodel"), io.BytesIO())


def plain_tar(path: Path) -> None:
    with tarfile.open(path, "w") as archive:
        archive.addfile(tarfile.TarInfo("models/a.caffemodel"), io.BytesIO())


def plain_zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("models/a.caffemodel", b"weights")


def truncated(path: Path) -> None:
    torch.save({"state_dict": {"conv1.0.weight": torch.zeros(64, 64)}}, path)
    path.write_bytes(path.read_bytes()[:-100])


def with_objects(path: Path) -> None:
    torch.save({"state_dict": {"conv1.0.weight": torch.zeros(1)}, "config": Path("a")}, path)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: path.write_text("\n<!DOCTYPE html><html>"), "is a web page"),
        (
            lambda path: path.write_text(
                "version https://git-lfs.github.com/spec/v1\noid sha256:0"
            ),
            "is a Git LFS pointer",
        ),
        (tar, r"is an archive: extract it .*models/a\.caffemodel"),
        (plain_tar, r"is an archive: extract it .*models/a\.caffemodel"),
        (plain_zip, r"is an archive: extract it .*models/a\.caffemodel"),
        (truncated, "is truncated"),
        (lambda path: path.write_bytes(b"\x1f\x8b cut"), "is a damaged archive"),
        (with_objects, "objects other than tensors"),
    ],
)
def test_what_is_not_a_weights_file_is_named(
    write: Callable[[Path], object], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "FlowNet2_checkpoint.pth.tar"
    write(path)
    with pytest.raises(WeightsError, match=message) as caught:
        load_weights(NETWORKS["FlowNet2"], path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("network", ["FlowNet2-s", "FlowNet2-SD"])
def test_the_network_in_an_mmflow_file_is_named(network: str, tmp_path: Path) -> None:
    nets, width = NETS[network]
    path = tmp_path / "net.pth"
    torch.save(checkpoint(mmflow(nets, make_blobs(nets, width))), path)
    with pytest.raises(WeightsError, match=f"it looks like {network}"):
        load_weights(NETWORKS["FlowNet2-C"], path)

"""Build a network with the weights of a file of any kind."""

import tarfile
import zipfile
from pathlib import Path

import torch
from torch import Tensor

from export.networks import NETWORKS, FlowNet2, Network, flow_scale
from export.weights.caffe import read_caffemodel, read_hdf5
from export.weights.checkpoint import read_checkpoint
from export.weights.file import Layer, WeightFile, WeightsError
from export.weights.safetensors import read_safetensors

CORRELATION_CHANNELS = 441


def load_weights(network: Network, path: Path) -> tuple[FlowNet2, WeightFile]:
    """Build a network with the weights of a file.

    Raises:
        WeightsError: the file is unreadable, or belongs to another network; the message is one
            line.
    """
    file = read_weights(path)
    problems = differences(network, file)
    if problems:
        more = f" (and {len(problems) - 1} more differences)" if len(problems) > 1 else ""
        raise WeightsError(
            f"{path.name} does not fit {network.name}: {problems[0]}{more}; {_likeness(file)}"
        )
    model = FlowNet2(network, file.semantics)
    if file.mean1 is not None and file.mean2 is not None:
        model.mean1.copy_(file.mean1.view(3, 1, 1))
        model.mean2.copy_(file.mean2.view(3, 1, 1))
    with torch.no_grad():
        for (block, layer), module in model.layers().items():
            stored = _find(network, file, block, layer)
            assert stored is not None
            assert module.bias is not None
            weight, bias = stored.weight, stored.bias
            kind = network.cascade[0] if block == "net1" else block
            if file.rgb and layer == ("conv0" if block in ("sd", "fusion") else "conv1"):
                weight = _rgb_to_bgr(weight)
            if file.summed_correlation and (kind, layer) == ("C", "conv3_1"):
                weight = _for_mean_correlation(weight, module.out_channels)
            module.weight.copy_(weight)
            module.bias.copy_(torch.zeros(len(module.bias)) if bias is None else bias)
            factor = file.units.get(block, flow_scale(block)) / flow_scale(block)
            if layer.startswith("predict"):
                module.weight.mul_(factor)
                module.bias.mul_(factor)
            elif layer.startswith("upflow"):
                module.weight.div_(factor)
    return model.eval(), file


def read_weights(path: Path) -> WeightFile:
    """Read a weights file; its content determines its kind.

    Raises:
        WeightsError: the file does not exist or has no supported format.
    """
    try:
        with path.open("rb") as stream:
            head = stream.read(512)
    except OSError as error:
        raise WeightsError(f"{path}: {error.strerror}") from error
    if head.startswith(b"\x89HDF"):
        return read_hdf5(path)
    if reason := _not_weights(path, head):
        raise WeightsError(f"{path.name} {reason}")
    if head.startswith((b"PK\x03\x04", b"\x80\x02")):
        return read_checkpoint(path)
    if head[8:9] == b"{":
        return read_safetensors(path)
    return read_caffemodel(path)


def _not_weights(path: Path, head: bytes) -> str | None:
    """Describe a file that a failed or wrong download left in place of a weights file."""
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if text.startswith((b"<!doctype html", b"<html", b"<head", b"<?xml")):
        return "is a web page: open the link in a browser to download the file itself"
    if text.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer, not the file: run `git lfs pull` in its repository"
    if head.startswith(b"PK\x03\x04") and not zipfile.is_zipfile(path):
        return "is truncated: download it again"
    if head.startswith((b"\x1f\x8b", b"PK\x03\x04")) or head[257:262] == b"ustar":
        return _archive(path)
    return None


def _archive(path: Path) -> str | None:
    """Describe an archive that has to be extracted first; None for PyTorch's own zip files."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
        if any(name.endswith("data.pkl") for name in names):
            return None
    else:
        try:
            with tarfile.open(path) as archive:
                names = archive.getnames()
        except (OSError, EOFError, tarfile.TarError):
            return "is a damaged archive: download it again"
    return f"is an archive: extract it and export one of its files ({', '.join(names[:3])}, …)"


def differences(network: Network, file: WeightFile) -> list[str]:
    """Return the differences between a file and a network: missing, misshapen or extra layers."""
    with torch.device("meta"):
        model = FlowNet2(network)
    expected: set[str] = set()
    missing, misshapen = [], []
    for (block, layer), module in model.layers().items():
        names = file.names(network, block, layer)
        expected.update(names)
        stored = _find(network, file, block, layer)
        if stored is None:
            missing.append(f"layer {names[0]} is missing")
        elif stored.weight.shape != module.weight.shape:
            misshapen.append(
                f"layer {names[0]} has shape {_shape(stored.weight)}, not {_shape(module.weight)}"
            )
        elif stored.bias is not None and stored.bias.shape != module.bias.shape:  # type: ignore[union-attr]
            misshapen.append(
                f"the bias of layer {names[0]} has shape {_shape(stored.bias)}, "
                f"not {_shape(module.bias)}"  # type: ignore[arg-type]
            )
    left_over = [f"layer {name} is left over" for name in file.layers if name not in expected]
    return misshapen + missing + left_over


def _find(network: Network, file: WeightFile, block: str, layer: str) -> Layer | None:
    names = file.names(network, block, layer)
    return next((file.layers[name] for name in names if name in file.layers), None)


def _likeness(file: WeightFile) -> str:
    """Name the networks that a file matches best."""
    counts = {name: len(differences(network, file)) for name, network in NETWORKS.items()}
    least = min(counts.values())
    alike = " or ".join(name for name, count in counts.items() if count == least)
    return (
        f"it looks like {alike}"
        if least < len(file.layers) // 2
        else "it looks like no network of ours"
    )


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "of a single number"


def _rgb_to_bgr(weight: Tensor) -> Tensor:
    """Reorder the image channels that a block's first convolution reads.

    The image channels come first: one image (3 channels of 3, or of Fusion's 11), two images (6 of
    6), or two images and the warped one (9 of 12).
    """
    images = {3: 1, 11: 1, 6: 2, 12: 3}[weight.shape[1]]
    order = [3 * image + channel for image in range(images) for channel in (2, 1, 0)]
    return weight[:, [*order, *range(3 * images, weight.shape[1])]]


def _for_mean_correlation(weight: Tensor, features: int) -> Tensor:
    """Scale weights for a correlation that is the mean over `features` channels, not the sum."""
    other = weight.shape[1] - CORRELATION_CHANNELS
    return torch.cat((weight[:, :other], weight[:, other:] * features), dim=1)

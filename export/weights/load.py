"""A network with the weights of a file, whatever kind of file it is."""

from pathlib import Path

import torch
from torch import Tensor

from export.networks import NETWORKS, FlowNet2, Network
from export.weights.caffe import read_caffemodel, read_hdf5
from export.weights.file import Layer, WeightFile, WeightsError
from export.weights.nvidia import read_nvidia
from export.weights.safetensors import read_safetensors


def load_weights(network: Network, path: Path) -> tuple[FlowNet2, WeightFile]:
    """Build a network with the weights of a file.

    Raises:
        WeightsError: the file is unreadable, or is not of this network; in one line.
    """
    file = read_weights(path)
    problems = differences(network, file)
    if problems:
        more = f" (and {len(problems) - 1} more differences)" if len(problems) > 1 else ""
        raise WeightsError(
            f"{path.name} does not fit {network.name}: {problems[0]}{more}; {_likeness(file)}"
        )
    model = FlowNet2(network, pair_mean=file.mean1 is None)
    if file.mean1 is not None and file.mean2 is not None:
        model.mean1.copy_(file.mean1.view(3, 1, 1))
        model.mean2.copy_(file.mean2.view(3, 1, 1))
    with torch.no_grad():
        for (block, layer), module in model.layers().items():
            stored = _find(network, file, block, layer)
            assert stored is not None
            weight = stored.weight
            if file.rgb and layer == ("conv0" if block in ("sd", "fusion") else "conv1"):
                weight = _rgb_to_bgr(weight)
            module.weight.copy_(weight)
            assert module.bias is not None
            module.bias.copy_(torch.zeros(len(module.bias)) if stored.bias is None else stored.bias)
    return model.eval(), file


def read_weights(path: Path) -> WeightFile:
    """Read a file of any of the four kinds.

    Raises:
        WeightsError: no such file, or none of the four kinds.
    """
    try:
        with path.open("rb") as stream:
            head = stream.read(16)
    except OSError as error:
        raise WeightsError(f"{path}: {error.strerror}") from error
    if head.startswith(b"\x89HDF"):
        return read_hdf5(path)
    if head.startswith((b"PK\x03\x04", b"\x80\x02")):
        return read_nvidia(path)
    if head[8:9] == b"{":
        return read_safetensors(path)
    return read_caffemodel(path)


def differences(network: Network, file: WeightFile) -> list[str]:
    """Where a file departs from a network, a phrase each: missing, other shape, left over."""
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
    """Which network a file looks like: the one it departs least from."""
    counts = {name: len(differences(network, file)) for name, network in NETWORKS.items()}
    least = min(counts.values())
    alike = " or ".join(name for name, count in counts.items() if count == least)
    return (
        f"it looks like {alike}" if least < len(file.layers) // 2 else "it looks like none of ours"
    )


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "of a single number"


def _rgb_to_bgr(weight: Tensor) -> Tensor:
    """Reorder the image channels that a block's first convolution reads.

    They come first: one image (3 of 3, or of Fusion's 11), two (6), or with the warped one three
    (9 of 12).
    """
    images = {3: 1, 11: 1, 6: 2, 12: 3}[weight.shape[1]]
    order = [3 * image + channel for image in range(images) for channel in (2, 1, 0)]
    return weight[:, [*order, *range(3 * images, weight.shape[1])]]

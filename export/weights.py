"""Reading and writing weight files.

Read: Caffe ``.caffemodel`` (binary) and ``.caffemodel.h5`` of the original release, ``.pth.tar``
checkpoints of NVIDIA's port, and our own ``.safetensors``. The kind of file is told by its content.
Nothing in a file is executed.

Every reader brings a file to the same form, :class:`WeightFile`: layers by the names that the file
uses. One function then holds them against the network asked for.
"""

import itertools
import json
import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from export.networks import NETWORKS, FlowNet2, Network

AUTHORS_LICENSE = "research only (FlowNet 2.0 release)"


class WeightsError(Exception):
    """A weights file that cannot be read, or that holds another network; the text says which."""


@dataclass
class Layer:
    """One layer as a file has it; ``bias`` may be absent."""

    weight: Tensor
    bias: Tensor | None = None


@dataclass
class WeightFile:
    """What a file holds.

    Attributes:
        names: the names under which this kind of file keeps a layer of a network's block.
        mean1, mean2: stored per-channel means (BGR, 0..1), None where the pair's mean is meant.
    """

    layers: dict[str, Layer]
    names: Callable[[Network, str, str], tuple[str, ...]]
    source: str
    license: str
    mean1: Tensor | None = None
    mean2: Tensor | None = None
    rgb: bool = False


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
        for (block, layer), module in network_layers(model).items():
            stored = _find(network, file, block, layer)
            assert stored is not None
            weight = stored.weight
            if file.rgb and layer == ("conv0" if block in ("sd", "fusion") else "conv1"):
                weight = _rgb_to_bgr(weight)
            module.weight.copy_(weight)
            assert module.bias is not None
            module.bias.copy_(torch.zeros(len(module.bias)) if stored.bias is None else stored.bias)
    return model.eval(), file


def save_weights(model: FlowNet2, path: Path, source: str, license: str) -> None:
    """Write our own format: float16 safetensors, with network, means and provenance as metadata.

    Args:
        source: where the weights come from, one sentence. license: SPDX expression or a sentence.
    """
    tensors = {}
    for (block, layer), module in network_layers(model).items():
        assert module.bias is not None
        tensors[f"{block}.{layer}.weight"] = module.weight.detach().half().contiguous()
        tensors[f"{block}.{layer}.bias"] = module.bias.detach().half().contiguous()
    metadata = {
        "network": model.network.name,
        "width": str(model.network.width),
        "mean1": json.dumps(None if model.pair_mean else model.mean1.flatten().tolist()),
        "mean2": json.dumps(None if model.pair_mean else model.mean2.flatten().tolist()),
        "source": source,
        "license": license,
    }
    save_file(tensors, path, metadata)


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
        return _read_hdf5(path)
    if head.startswith((b"PK\x03\x04", b"\x80\x02")):
        return _read_nvidia(path)
    if head[8:9] == b"{":
        return _read_safetensors(path)
    return _read_caffemodel(path)


def network_layers(model: FlowNet2) -> dict[tuple[str, str], nn.Conv2d | nn.ConvTranspose2d]:
    """All convolutions, by block ("net1", "sd", …) and layer name ("conv3_1", "predict6", …)."""
    return {
        (name.split(".")[1], name.rpartition(".")[2]): module
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d)
    }


def differences(network: Network, file: WeightFile) -> list[str]:
    """Where a file departs from a network, a phrase each: missing, other shape, left over."""
    with torch.device("meta"):
        model = FlowNet2(network)
    expected: set[str] = set()
    missing, misshapen = [], []
    for (block, layer), module in network_layers(model).items():
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


# Caffe

CAFFE_PREFIX = {"net1": "", "net2": "net2_", "net3": "net3_", "sd": "netsd_", "fusion": "fuse_"}


def caffe_names(network: Network, block: str, layer: str) -> tuple[str, ...]:
    """Names that the original release gives a layer (deploy prototxts of lmb-freiburg/flownet2)."""
    prefix = "" if network.cascade == ("SD",) else CAFFE_PREFIX[block]
    if layer.startswith("predict"):
        level = int(layer.removeprefix("predict"))
        numbered, named = f"Convolution{7 - level}", f"predict_conv{level}"
        if block in ("net2", "net3"):
            return (prefix + named,)
        if block == "fusion":
            return (f"{prefix}_{numbered}",)
        if block == "net1" and network.cascade[0] == "S":
            return (named, numbered)
        return (prefix + numbered,)
    if layer.startswith("upflow"):
        level = int(layer.removeprefix("upflow"))
        twice = prefix if block in ("net2", "net3") else ""
        return (f"{prefix}{twice}upsample_flow{level + 1}to{level}",)
    return (prefix + layer,)


def _read_hdf5(path: Path) -> WeightFile:
    try:
        with h5py.File(path, "r") as file:
            group = file.get("data")
            if not isinstance(group, h5py.Group):
                raise WeightsError(f"{path.name}: an HDF5 file without Caffe's group /data")
            blobs = {
                name: [np.asarray(layer[str(i)]) for i in range(len(layer))]
                for name, layer in group.items()
            }
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise WeightsError(f"{path.name}: broken HDF5 file: {error}") from error
    return _from_caffe_blobs(path, blobs)


def _read_caffemodel(path: Path) -> WeightFile:
    net = _caffe_message("NetParameter")()
    try:
        net.ParseFromString(path.read_bytes())
    except DecodeError as error:
        raise WeightsError(
            f"{path.name}: neither a Caffe model, nor HDF5, nor a PyTorch checkpoint, "
            "nor safetensors"
        ) from error
    blobs = {
        layer.name: [_blob_array(path, layer.name, blob) for blob in layer.blobs]
        for layer in itertools.chain(net.layer, net.layers)
    }
    if not any(blobs.values()):
        raise WeightsError(f"{path.name}: holds no layer with weights")
    return _from_caffe_blobs(path, blobs)


def _blob_array(path: Path, layer: str, blob: Any) -> NDArray[np.float32]:
    values = np.frombuffer(blob.double_data, "<f8").astype(np.float32)
    if not len(values):
        values = np.frombuffer(blob.data, "<f4")
    shape = tuple(blob.shape.dim) or (blob.num, blob.channels, blob.height, blob.width)
    if not shape or int(np.prod(shape)) != len(values):
        raise WeightsError(
            f"{path.name}: layer {layer} declares {'x'.join(map(str, shape))} values "
            f"and holds {len(values)}; the file is cut off or of another format"
        )
    return values.reshape(shape)


def _from_caffe_blobs(path: Path, blobs: Mapping[str, list[NDArray[Any]]]) -> WeightFile:
    """Caffe's blobs of each layer: weight and bias, or for ``DataAugmentation`` iteration count,
    per-pixel mean and per-channel mean."""
    means = []
    for layer in ("img0s_aug", "img1s_aug"):
        if len(blobs.get(layer, ())) != 3 or blobs[layer][2].size != 3:
            raise WeightsError(
                f"{path.name}: layer {layer} with the per-channel mean as third blob is missing"
            )
        means.append(torch.from_numpy(blobs[layer][2].astype(np.float32).reshape(3)))
    layers = {}
    for name, values in blobs.items():
        # scale_conv1 holds the scale of one input size; all other layers without a four-axis
        # first blob hold no weights of the network.
        if not values or values[0].ndim != 4 or name in ("img0s_aug", "img1s_aug", "scale_conv1"):
            continue
        tensors = [torch.from_numpy(np.array(value, np.float32)) for value in values]
        layers[name] = Layer(tensors[0], tensors[1].reshape(-1) if len(tensors) > 1 else None)
    return WeightFile(
        layers, caffe_names, path.name, AUTHORS_LICENSE, mean1=means[0], mean2=means[1]
    )


def _caffe_message(name: str) -> Any:
    """The part of caffe.proto that holds weights.

    Packed floats and bytes look the same on the wire: as bytes, NumPy reads them without a copy.
    """
    pool = descriptor_pool.DescriptorPool()
    file = descriptor_pb2.FileDescriptorProto(name="caffe.proto", package="caffe")
    kind = descriptor_pb2.FieldDescriptorProto

    def message(name: str, *fields: tuple[str, int, int, bool, str]) -> None:
        descriptor = file.message_type.add(name=name)
        for field_name, number, field_type, repeated, type_name in fields:
            descriptor.field.add(
                name=field_name,
                number=number,
                type=field_type,
                label=kind.LABEL_REPEATED if repeated else kind.LABEL_OPTIONAL,
                type_name=f".caffe.{type_name}" if type_name else None,
            )

    message("BlobShape", ("dim", 1, kind.TYPE_INT64, True, ""))
    message(
        "BlobProto",
        *(
            (axis, i, kind.TYPE_INT32, False, "")
            for i, axis in enumerate(("num", "channels", "height", "width"), start=1)
        ),
        ("data", 5, kind.TYPE_BYTES, False, ""),
        ("shape", 7, kind.TYPE_MESSAGE, False, "BlobShape"),
        ("double_data", 8, kind.TYPE_BYTES, False, ""),
    )
    for layer, name_number, blobs_number in (("LayerParameter", 1, 7), ("V1LayerParameter", 4, 6)):
        message(
            layer,
            ("name", name_number, kind.TYPE_STRING, False, ""),
            ("blobs", blobs_number, kind.TYPE_MESSAGE, True, "BlobProto"),
        )
    message(
        "NetParameter",
        ("layers", 2, kind.TYPE_MESSAGE, True, "V1LayerParameter"),
        ("layer", 100, kind.TYPE_MESSAGE, True, "LayerParameter"),
    )
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName(f"caffe.{name}"))


# NVIDIA's port

NVIDIA_PREFIX = {
    "net1": "flownetc.",
    "net2": "flownets_1.",
    "net3": "flownets_2.",
    "sd": "flownets_d.",
    "fusion": "flownetfusion.",
}


def nvidia_names(network: Network, block: str, layer: str) -> tuple[str, ...]:
    """The module that NVIDIA/flownet2-pytorch keeps a layer in."""
    alone = len(network.cascade) == 1 and not network.fusion
    prefix = "" if alone else NVIDIA_PREFIX[block]
    if layer.startswith("predict"):
        return (f"{prefix}predict_flow{layer.removeprefix('predict')}",)
    if layer.startswith("upflow"):
        level = int(layer.removeprefix("upflow"))
        return (f"{prefix}upsampled_flow{level + 1}_to_{level}",)
    return (f"{prefix}{layer.replace('interconv', 'inter_conv')}.0",)


def _read_nvidia(path: Path) -> WeightFile:
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise WeightsError(
            f"{path.name}: not a PyTorch checkpoint of tensors alone (nothing else is loaded)"
        ) from error
    state = checkpoint.get("state_dict", checkpoint) if isinstance(checkpoint, dict) else None
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise WeightsError(f"{path.name}: the checkpoint has no state_dict of tensors")
    modules: dict[str, dict[str, Tensor]] = {}
    for name, tensor in state.items():
        module, _, parameter = name.removeprefix("module.").rpartition(".")
        modules.setdefault(module, {})[parameter] = tensor
    layers = {
        name: Layer(parameters["weight"].float(), _float(parameters.get("bias")))
        for name, parameters in modules.items()
        if "weight" in parameters and "running_mean" not in parameters
    }
    for name, parameters in modules.items():
        if "running_mean" in parameters:  # conv1.1 normalises what conv1.0 gives
            convolution = name.rpartition(".")[0] + ".0"
            if convolution not in layers:
                raise WeightsError(f"{path.name}: batch-norm {name} follows no convolution")
            _fold_batch_norm(layers[convolution], parameters)
    return WeightFile(layers, nvidia_names, path.name, AUTHORS_LICENSE, rgb=True)


def _float(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.float()


def _fold_batch_norm(layer: Layer, norm: Mapping[str, Tensor], epsilon: float = 1e-5) -> None:
    """Scale and shift a convolution (not a transposed one) as the batch-norm after it does."""
    gain = norm["weight"] / (norm["running_var"] + epsilon).sqrt()
    bias = torch.zeros_like(gain) if layer.bias is None else layer.bias
    layer.weight = layer.weight * gain[:, None, None, None]
    layer.bias = (bias - norm["running_mean"]) * gain + norm["bias"]


# Our own


def own_names(network: Network, block: str, layer: str) -> tuple[str, ...]:
    """Names in our files: block and layer."""
    return (f"{block}.{layer}",)


def _read_safetensors(path: Path) -> WeightFile:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise WeightsError(f"{path.name}: broken safetensors file: {error}") from error
    try:
        mean1, mean2 = (_mean(json.loads(metadata[key])) for key in ("mean1", "mean2"))
        source, license = metadata["source"], metadata["license"]
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise WeightsError(f"{path.name}: safetensors without our metadata ({error})") from error
    layers = {
        name.removesuffix(".weight"): Layer(
            tensor, tensors.get(name.removesuffix("weight") + "bias")
        )
        for name, tensor in tensors.items()
        if name.endswith(".weight")
    }
    return WeightFile(layers, own_names, source, license, mean1, mean2)


def _mean(numbers: Any) -> Tensor | None:
    """A stored mean; TypeError or RuntimeError where it is not one number for each channel."""
    return None if numbers is None else torch.tensor(numbers, dtype=torch.float32).view(3)

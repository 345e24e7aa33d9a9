"""Our own format: safetensors with the network, means and provenance as metadata."""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from export.networks import CAFFE, FlowNet2, Network
from export.weights.file import Layer, WeightFile, WeightsError


def save_weights(model: FlowNet2, path: Path, source: str, license: str) -> None:
    """Write the weights of a network with Caffe's semantics as float16 safetensors.

    Args:
        source: where the weights come from, in one sentence.
        license: SPDX expression or one sentence.
    """
    assert model.semantics == CAFFE
    tensors = {}
    for (block, layer), module in model.layers().items():
        assert module.bias is not None
        tensors[f"{block}.{layer}.weight"] = module.weight.detach().half().contiguous()
        tensors[f"{block}.{layer}.bias"] = module.bias.detach().half().contiguous()
    metadata = {
        "network": model.network.name,
        "width": str(model.network.width),
        "mean1": json.dumps(model.mean1.flatten().tolist()),
        "mean2": json.dumps(model.mean2.flatten().tolist()),
        "source": source,
        "license": license,
    }
    save_file(tensors, path, metadata)


def own_names(network: Network, block: str, layer: str) -> tuple[str, ...]:
    """Return a layer's name in our files."""
    return (f"{block}.{layer}",)


def read_safetensors(path: Path) -> WeightFile:
    """Read a file written by :func:`save_weights`."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise WeightsError(f"{path.name}: broken safetensors file: {error}") from error
    try:
        mean1, mean2 = (
            torch.tensor(json.loads(metadata[key]), dtype=torch.float32).view(3)
            for key in ("mean1", "mean2")
        )
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
    description = "safetensors: BGR, stored mean"
    return WeightFile(layers, own_names, source, license, description, mean1, mean2)

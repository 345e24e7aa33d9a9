"""Our own format: safetensors with network, means and provenance as metadata."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from export.networks import FlowNet2, Network
from export.weights.file import Layer, WeightFile, WeightsError


def save_weights(model: FlowNet2, path: Path, source: str, license: str) -> None:
    """Write our own format: float16 safetensors, with network, means and provenance as metadata.

    Args:
        source: where the weights come from, one sentence. license: SPDX expression or a sentence.
    """
    tensors = {}
    for (block, layer), module in model.layers().items():
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


def own_names(network: Network, block: str, layer: str) -> tuple[str, ...]:
    """Names in our files: block and layer."""
    return (f"{block}.{layer}",)


def read_safetensors(path: Path) -> WeightFile:
    """Read what :func:`save_weights` wrote."""
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

"""``.pth.tar`` checkpoints of NVIDIA's port (NVIDIA/flownet2-pytorch)."""

import pickle
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from export.networks import Network
from export.weights.file import AUTHORS_LICENSE, Layer, WeightFile, WeightsError

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


def read_nvidia(path: Path) -> WeightFile:
    """Read a ``.pth.tar``, executing nothing in it."""
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

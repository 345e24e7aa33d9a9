"""PyTorch checkpoints of the projects in :mod:`export.weights.sources`."""

import dataclasses
import pickle
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from export.weights.file import Layer, WeightFile, WeightsError
from export.weights.sources import find_source

PREFIXES = ("module.", "model.")  # of DataParallel and Lightning


def read_checkpoint(path: Path) -> WeightFile:
    """Read a checkpoint of tensors and plain values, without executing anything in it.

    Raises:
        WeightsError: the file cannot be read, or holds no state_dict.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise WeightsError(
            f"{path.name}: not a PyTorch checkpoint, or one with objects other than tensors, which "
            "are not loaded: save only the network's state_dict"
        ) from error
    state = checkpoint.get("state_dict", checkpoint) if isinstance(checkpoint, dict) else None
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise WeightsError(f"{path.name}: the checkpoint has no state_dict of tensors")
    state = {_without_prefixes(name): tensor for name, tensor in state.items()}
    source = find_source(checkpoint, state, path.name)
    units = dict(source.units)
    if isinstance(div_flow := checkpoint.get("div_flow"), int | float):  # FlowNetPytorch
        units["net1"] = float(div_flow)
    mean = torch.tensor(source.mean) if source.semantics.mean == "stored" else None
    return WeightFile(
        _layers(path, state),
        source.names,
        source=f"{path.name} ({source.name})",
        license=source.license,
        description=str(source),
        mean1=mean,
        mean2=mean,
        rgb=source.rgb,
        summed_correlation=source.summed_correlation,
        units=units,
        semantics=source.semantics,
    )


def _without_prefixes(name: str) -> str:
    while name.startswith(PREFIXES):
        name = name.partition(".")[2]
    return name


def _layers(path: Path, state: Mapping[str, Tensor]) -> dict[str, Layer]:
    modules: dict[str, dict[str, Tensor]] = {}
    for name, tensor in state.items():
        module, _, parameter = name.rpartition(".")
        modules.setdefault(module, {})[parameter] = tensor.float()
    layers = {
        name: Layer(parameters["weight"], parameters.get("bias"))
        for name, parameters in modules.items()
        if "weight" in parameters and "running_mean" not in parameters
    }
    for name, parameters in modules.items():
        if "running_mean" in parameters:  # conv1.1 normalises the output of conv1.0
            convolution = name.rpartition(".")[0] + ".0"
            if convolution not in layers:
                raise WeightsError(f"{path.name}: batch-norm {name} follows no convolution")
            layers[convolution] = _folded(layers[convolution], parameters)
    return layers


def _folded(layer: Layer, norm: Mapping[str, Tensor], epsilon: float = 1e-5) -> Layer:
    """Fold a batch-norm into the convolution (not a transposed one) before it."""
    gain = norm["weight"] / (norm["running_var"] + epsilon).sqrt()
    bias = torch.zeros_like(gain) if layer.bias is None else layer.bias
    return dataclasses.replace(
        layer,
        weight=layer.weight * gain[:, None, None, None],
        bias=(bias - norm["running_mean"]) * gain + norm["bias"],
    )

"""Exported networks with random weights, for the tests that read their files."""

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import onnx
import pytest
import torch

from export.graph import export_onnx
from export.half import to_half
from export.networks import NETWORKS, FlowNet2

# A network of each architecture; the other names differ only in their weights.
ARCHITECTURES: dict[object, str] = {}
for _network in NETWORKS.values():
    ARCHITECTURES.setdefault((_network.cascade, _network.width, _network.fusion), _network.name)
# Together they have every block, alone and after others.
USUAL = ("FlowNet2-ss", "FlowNet2-cs", "FlowNet2-SD", "FlowNet2")
EXPORTS = [
    pytest.param(
        (name, half),
        id=f"{name}-{'fp16' if half else 'fp32'}",
        marks=() if name in USUAL else pytest.mark.long,
    )
    for name in ARCHITECTURES.values()
    for half in (False, True)
    if not half or name in ("FlowNet2-c", "FlowNet2-css", "FlowNet2")
]


@dataclass(frozen=True)
class Exported:
    """A network (float32), and its ONNX file, in float16 if `half`."""

    name: str
    half: bool
    model: FlowNet2
    proto: onnx.ModelProto
    file: Path


def random_weights(name: str) -> FlowNet2:
    """Return a network whose random weights give smooth flows of some ten pixels."""
    torch.manual_seed(0)
    model = FlowNet2(NETWORKS[name]).eval()
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.ConvTranspose2d):
            torch.nn.init.kaiming_normal_(module.weight, a=0.1)
            assert module.bias is not None
            torch.nn.init.normal_(module.bias, std=0.05)
            if module.out_channels == 2:
                module.weight.data *= 0.3
    model.mean1.copy_(torch.tensor([0.41, 0.43, 0.45]).view(3, 1, 1))
    model.mean2.copy_(torch.tensor([0.41, 0.43, 0.45]).view(3, 1, 1))
    return model


@functools.lru_cache(maxsize=1)
def _in_float(name: str) -> tuple[FlowNet2, onnx.ModelProto]:
    model = random_weights(name)
    return model, export_onnx(model)


def export(name: str, half: bool, folder: Path) -> Iterator[Exported]:
    """Export one of EXPORTS; the file is removed afterwards, since all together are large."""
    model, proto = _in_float(name)
    if half:
        proto = to_half(proto)
    file = folder / "model.onnx"
    onnx.save(proto, file)
    yield Exported(name, half, model, proto, file)
    file.unlink()

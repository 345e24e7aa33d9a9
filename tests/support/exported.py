"""Exported networks with random weights, for the tests of what reads them."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import onnx
import torch

from export.graph import export_onnx
from export.half import to_half
from export.networks import NETWORKS, FlowNet2

# One of each architecture; the other names differ in their weights alone.
ARCHITECTURES = list(
    {(n.cascade, n.width, n.fusion): name for name, n in NETWORKS.items()}.values()
)
EXPORTS = [
    *((name, False) for name in ARCHITECTURES),
    ("FlowNet2-c", True),
    ("FlowNet2-css", True),
    ("FlowNet2", True),
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
    """Weights that give smooth flows of some ten pixels, as trained ones do."""
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


def export(name: str, half: bool, folder: Path) -> Iterator[Exported]:
    """One of EXPORTS; its file is removed afterwards, all of them together being large."""
    model = random_weights(name)
    proto = export_onnx(model)
    if half:
        proto = to_half(proto)
    file = folder / "model.onnx"
    onnx.save(proto, file)
    yield Exported(name, half, model, proto, file)
    file.unlink()

"""Table of the PyTorch projects whose checkpoints can be read: names, input and semantics."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from export.networks import CAFFE, Network, Semantics
from export.weights.file import AUTHORS_LICENSE

NVIDIA_BLOCKS = {
    "net1": "flownetc.",
    "net2": "flownets_1.",
    "net3": "flownets_2.",
    "sd": "flownets_d.",
    "fusion": "flownetfusion.",
}
MMFLOW_BLOCKS = {
    "net1": "flownetC.",
    "net2": "flownetS1.",
    "net3": "flownetS2.",
    "sd": "flownetSD.",
    "fusion": "flownet_fusion.",
}


def nvidia_names(network: Network, block: str, layer: str) -> tuple[str, ...]:
    """Return the module in which NVIDIA/flownet2-pytorch and its descendants keep a layer."""
    prefix = "" if network.alone else NVIDIA_BLOCKS[block]
    if layer.startswith("predict"):
        return (f"{prefix}predict_flow{layer.removeprefix('predict')}",)
    if layer.startswith("upflow"):
        level = int(layer.removeprefix("upflow"))
        return (f"{prefix}upsampled_flow{level + 1}_to_{level}",)
    return (f"{prefix}{layer.replace('interconv', 'inter_conv')}.0",)


def mmflow_names(network: Network, block: str, layer: str) -> tuple[str, ...]:
    """Return the module in which mmflow keeps a layer."""
    prefix = "" if network.alone else MMFLOW_BLOCKS[block]
    if network.fusion and block.startswith("net"):
        prefix = f"flownetCSS.{prefix}"
    kind = network.cascade[int(block[3:]) - 1] if block.startswith("net") else block
    if layer == "conv_redir":
        return (f"{prefix}corr_encoder.conv_redir.conv",)
    if layer == "conv0" and kind == "sd":
        return (f"{prefix}encoder.plugin_layer.conv",)
    name, level, second = re.fullmatch(r"(\D+)(\d)(_1)?", layer).groups()  # type: ignore[union-attr]
    number = int(level) + (kind == "fusion")  # Fusion numbers its levels from 1
    if name == "conv":
        encoder, first, position = "encoder", 1, 1 if second else 0
        if kind == "C" and (number > 3 or second):
            encoder, first = "corr_encoder", 3
            position = 0 if number == 3 else position
        return (f"{prefix}{encoder}.layers.{number - first}.layers.{position}.conv",)
    has_interconv = number < {"sd": 6, "fusion": 3}.get(kind, 0)
    number, module = {
        "predict": (number, "pred_out.1" if has_interconv else "pred_out"),
        "interconv": (number, "pred_out.0"),
        "deconv": (number + 1, "deconv_out.deconvs.0"),
        "upflow": (number + 1, "upsample_pred.deconvs.0"),
    }[name]
    return (f"{prefix}decoder.decoders.level{number}.{module}",)


@dataclass(frozen=True)
class Source:
    """A project that trains or converts FlowNet networks, and how its checkpoints differ from ours.

    Attributes:
        license: licence of the weights that the project publishes.
        names: returns the names of a layer in the project's files.
        semantics: treatment of images and flow.
        rgb: whether the first convolutions read RGB; ours read BGR.
        mean: per-channel mean (BGR, 0..1) if `semantics` subtracts a stored one.
        summed_correlation: whether the correlation is the sum over channels; ours is the mean.
        units: pixels in a unit of a block's predictions, for blocks whose unit differs from ours.
    """

    name: str
    license: str
    names: Callable[[Network, str, str], tuple[str, ...]] = nvidia_names
    semantics: Semantics = CAFFE
    rgb: bool = True
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)
    summed_correlation: bool = False
    units: Mapping[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        mean = {"pair": "mean of the pair", "image": "mean of each image"}.get(self.semantics.mean)
        if not mean:
            mean = f"mean {self.mean} (BGR)" if any(self.mean) else "no mean"
        found = ["RGB" if self.rgb else "BGR", mean]
        found += ["summed correlation"] * self.summed_correlation
        found += ["edge warp"] * self.semantics.edge_warp
        found += ["unaligned upsampling"] * (not self.semantics.aligned)
        found += ["no resizing"] * (not self.semantics.resized)
        return f"{self.name}: {', '.join(found)}"


NVIDIA = Source("NVIDIA/flownet2-pytorch", AUTHORS_LICENSE, semantics=Semantics(mean="pair"))
PTLFLOW = Source("ptlflow", AUTHORS_LICENSE, semantics=Semantics(mean="image"))
FLOWNETPYTORCH = Source(
    "FlowNetPytorch",
    "MIT (weights published with FlowNetPytorch)",
    semantics=Semantics(resized=False),
    mean=(0.45, 0.432, 0.411),
)
# Freiburg's FlowNetS, converted by FlowNetPytorch's author, expects BGR minus the same numbers.
FROM_CAFFE = Source(
    "FlowNetPytorch, from Caffe",
    AUTHORS_LICENSE,
    semantics=Semantics(resized=False),
    rgb=False,
    mean=(0.411, 0.432, 0.45),
)
MMFLOW = Source(
    "mmflow",
    "Apache-2.0 (weights published with mmflow)",
    names=mmflow_names,
    semantics=Semantics(edge_warp=True, aligned=False),
    rgb=False,
    summed_correlation=True,
    units={"sd": 20.0},
)


def find_source(checkpoint: Mapping[str, Any], state: Mapping[str, Any], file: str) -> Source:
    """Return the project that wrote a checkpoint.

    Args:
        checkpoint: contents of the file.
        state: tensors by name, without prefixes.
        file: name of the file, which alone identifies FlowNetPytorch's conversion from Caffe.
    """
    if any(".pred_out" in name for name in state):
        return MMFLOW
    if "pytorch-lightning_version" in checkpoint:
        return PTLFLOW
    if str(checkpoint.get("arch", "FlowNet2")).islower() or (
        "predict_flow6.weight" in state and "predict_flow6.bias" not in state
    ):
        return FROM_CAFFE if "from_caffe" in file else FLOWNETPYTORCH
    return NVIDIA

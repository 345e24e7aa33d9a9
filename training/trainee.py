"""A network in training: the blocks that are trained, and the frozen blocks that feed them."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import torch
from torch import Tensor, nn

from export.networks import CAFFE, NETWORKS, FlowNet2, FlowNetC, flow_scale
from training.model import TrainingC


def take_weights(model: FlowNet2, path: Path) -> tuple[set[str], str]:
    """Copy the image means and the matching blocks of a weights file into `model`.

    Returns:
        The names of these blocks, and the source of the file.

    Raises:
        WeightsError: the file is unreadable, or holds no network or a network of another width.
    """
    # Imported here because it needs more than PyTorch and NumPy.
    from export.weights import WeightsError, load_weights, read_weights  # noqa: PLC0415
    from export.weights.load import differences  # noqa: PLC0415

    file = read_weights(path)
    width = model.network.width
    fitting = [n for n in NETWORKS.values() if n.width == width and not differences(n, file)]
    if not fitting or file.semantics != CAFFE:
        raise WeightsError(f"{path.name} holds no blocks that {model.network.name} has")
    stored, _ = load_weights(fitting[0], path)
    model.mean1.copy_(stored.mean1)
    model.mean2.copy_(stored.mean2)
    blocks = set(model.blocks) & set(stored.blocks)
    for block in blocks:
        model.blocks[block].load_state_dict(stored.blocks[block].state_dict())
    return blocks, file.source


class Trainee(nn.Module):
    """A network up to the last of its trained `blocks`; other blocks are frozen."""

    def __init__(self, model: FlowNet2, blocks: Collection[str]) -> None:
        super().__init__()
        self.model = model
        names = list(model.blocks)
        self.names = names[: 1 + max(names.index(block) for block in blocks)]
        self.blocks = [block for block in self.names if block in blocks]
        for name, block in model.blocks.items():
            block.requires_grad_(name in blocks)
        first = model.blocks["net1"] if "net1" in blocks else None
        self.matcher = TrainingC(first) if isinstance(first, FlowNetC) else None
        self.scale = flow_scale(self.blocks[-1])

    def trained(self) -> dict[str, nn.Parameter]:
        """Return the trained parameters by name."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def modules_of(self, block: str) -> list[nn.Module]:
        """Return the modules that hold the parameters of a trained block."""
        if self.matcher is not None and block == "net1":
            return [self.matcher]
        return [self.model.blocks[block]]

    def cost(self, images: Tensor) -> Tensor:
        """Return FlowNetC's cost volume of images [2, N, 3, H, W], BGR in 0..1."""
        assert self.matcher is not None
        return self.matcher.features(images - self.means())[1]

    def forward(self, images: Tensor) -> tuple[list[list[Tensor]], Tensor | None]:
        """Return the predictions of each trained block, and the cost volume of a trained FlowNetC.

        Predictions are coarsest first, in units of `scale` pixels.

        Args:
            images: [2, N, 3, H, W], BGR in 0..1.
        """
        images = images - self.means()
        first, second = images
        predictions: list[list[Tensor]] = []
        cost = None
        flows: dict[str, Tensor] = {}
        for name in self.names:
            if name == "net1" and self.matcher is not None:
                features, cost = self.matcher.features(images)
                levels = self.matcher.decode(features, cost)
            else:
                inputs = self.model.inputs(name, first, second, flows)
                levels = self.model.blocks[name](
                    *(x.contiguous(memory_format=torch.channels_last) for x in inputs)
                )
            flows[name] = levels[-1].float() * flow_scale(name)
            if name in self.blocks:
                predictions.append(levels)
        return predictions, cost

    def means(self) -> Tensor:
        """Return the means that are subtracted from the images, [2, 1, 3, 1, 1]."""
        return torch.stack((self.model.mean1, self.model.mean2))[:, None]

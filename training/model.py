"""FlowNetC with a factored layer for training, and the initialisation of weights.

FlowNetC reads its 441 correlation channels through a 3x3 convolution. It takes three tenths of all
arithmetic, and its weights for large displacements rarely see a match. In training the 441 channels
are first projected onto a smaller, learned basis of smooth bumps over the plane of displacements.
Both steps are linear, so their product is the convolution of the original network.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from export.networks import Conv, EncoderDecoder, FlowNet2, FlowNetC
from training.cost import RADIUS, cost_volume

FLOW_CHANNELS = (9, 10)  # channels of the inputs of a refining FlowNetS


def displacement_basis() -> Tensor:
    """Return smooth functions of the displacement, [K, 441].

    They are single displacements near zero, wider bumps farther out, and the moments 1, u and v.
    """
    axis = torch.arange(-RADIUS, RADIUS + 1).float()
    v, u = (grid.flatten() for grid in torch.meshgrid(axis, axis, indexing="ij"))
    rows = []
    # (centres along each axis, width of the bump, radius covered by the finer set)
    for centres, width, inner in (
        (range(-2, 3), 0.0, -1),
        (range(-6, 7, 2), 1.0, -1),
        (range(-10, 11, 5), 2.2, 5),
    ):
        for y in centres:
            for x in centres:
                if max(abs(x), abs(y)) <= inner:
                    continue
                square = (u - x) ** 2 + (v - y) ** 2
                bump = torch.exp(-square / (2 * width**2)) if width else (square == 0).float()
                rows.append(bump / bump.norm())
    rows += [torch.full_like(u, 1 / 21), u / u.norm(), v / v.norm()]
    return torch.stack(rows)


class TrainingC(nn.Module):
    """Training form of FlowNetC; wraps the block whose parameters it trains.

    `block.tail["conv3_1"]` is not used before :meth:`fold` writes the product of `basis` and
    `factor` into it.
    """

    def __init__(self, block: FlowNetC) -> None:
        super().__init__()
        self.block = block
        self.basis = nn.Parameter(displacement_basis())
        plain = block.tail["conv3_1"]
        assert isinstance(plain, Conv)
        plain.requires_grad_(False)
        self.redirected = plain.in_channels - 441
        self.factor = Conv(self.redirected + len(self.basis), plain.out_channels)
        # Logarithm of the factor between correlations and logits, and the logit of "no match".
        self.log_factor = nn.Parameter(torch.tensor(math.log(20.0)))
        self.no_match = nn.Parameter(torch.zeros(1))

    def features(self, images: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Return the stem features of the first images of [2, N, 3, H, W], and the cost volume."""
        count = images.shape[1]
        both = self.block.stem(images.flatten(0, 1).contiguous(memory_format=torch.channels_last))
        first = {name: feature[:count] for name, feature in both.items()}
        return first, cost_volume(first["conv3"], both["conv3"][count:])

    def logits(self, cost: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits of the matching loss, and the logit of "no match"."""
        return cost.float() * self.log_factor.exp(), self.no_match

    def decode(self, features: dict[str, Tensor], cost: Tensor) -> list[Tensor]:
        """Return the predictions of levels 6 to 2 from the output of :meth:`features`."""
        projected = F.conv2d(F.leaky_relu(cost, 0.1), self.basis[:, :, None, None])
        x = self.factor(torch.cat((self.block.conv_redir(features["conv3"]), projected), 1))
        features = features | {"conv3_1": x}
        for name, layer in self.block.tail.items():
            if name != "conv3_1":
                x = features[name] = layer(x)
        flows: list[Tensor] = self.block.decoder(features)
        return flows

    def fold_temperature(self, peak: float = 3.0) -> None:
        """Scale the features so that correlations are logits / `peak`: of order one, not 1/20."""
        with torch.no_grad():
            scale = self.log_factor.exp() / peak
            conv3 = self.block.stem["conv3"]
            assert isinstance(conv3, Conv)
            assert conv3.bias is not None
            conv3.weight *= scale.sqrt()
            conv3.bias *= scale.sqrt()
            self.log_factor.fill_(math.log(peak))

    def unfold(self) -> None:
        """Set basis and factor to the best approximation of the plain conv3_1 of their rank.

        This is the inverse of :meth:`fold`.
        """
        with torch.no_grad():
            plain = self.block.tail["conv3_1"]
            assert isinstance(plain, Conv)
            assert plain.bias is not None
            assert self.factor.bias is not None
            weight = plain.weight[:, self.redirected :].permute(0, 2, 3, 1)
            left, size, right = torch.linalg.svd(weight.flatten(0, 2), full_matrices=False)
            rank = len(self.basis)
            self.basis.copy_(right[:rank])
            factor = (left[:, :rank] * size[:rank]).view(*weight.shape[:3], rank)
            self.factor.weight[:, : self.redirected] = plain.weight[:, : self.redirected]
            self.factor.weight[:, self.redirected :] = factor.permute(0, 3, 1, 2)
            self.factor.bias.copy_(plain.bias)

    def after_features(self) -> list[nn.Module]:
        """Return the modules that read the features and the cost volume."""
        return [self.block.conv_redir, self.factor, self.block.tail, self.block.decoder]

    def fold(self) -> None:
        """Write the product of basis and factor into the plain conv3_1 of the block."""
        with torch.no_grad():
            plain = self.block.tail["conv3_1"]
            assert isinstance(plain, Conv)
            weight, bias = self.factor.weight, self.factor.bias
            assert plain.bias is not None
            assert bias is not None
            product = torch.einsum(
                "okyx,kd->odyx", weight[:, self.redirected :].double(), self.basis.double()
            )
            plain.weight[:, : self.redirected] = weight[:, : self.redirected]
            plain.weight[:, self.redirected :] = product.to(plain.weight)
            plain.bias.copy_(bias)


def initialise(block: nn.Module, seed: int) -> None:
    """Initialise convolutions as orthogonal matrices, and predictions to pass flow up the levels.

    Every `upflow` is a bilinear upsampling, and every prediction except the coarsest is the
    upsampled flow of the level below, so that each level learns a correction.
    """
    torch.manual_seed(seed)
    bilinear = torch.tensor([0.25, 0.75, 0.75, 0.25])
    for name, layer in block.named_modules():
        if not isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
            continue
        assert layer.bias is not None
        nn.init.zeros_(layer.bias)
        if "upflow" in name:
            nn.init.zeros_(layer.weight)
            with torch.no_grad():
                layer.weight[[0, 1], [0, 1]] = bilinear[:, None] * bilinear
        elif "predict" in name:
            nn.init.normal_(layer.weight, std=0.1 / math.sqrt(layer.in_channels * 9))
            if not name.endswith("predict6"):  # the last two inputs are the upsampled flow
                with torch.no_grad():
                    layer.weight[:, -2:] = 0
                    layer.weight[[0, 1], [-2, -1], 1, 1] = 1
        else:
            nn.init.orthogonal_(layer.weight, gain=math.sqrt(2))


def initialise_from_data(parts: Iterable[nn.Module], forward: Callable[[], Any]) -> None:
    """Scale the convolutions of `parts` by their outputs on one batch (Salimans and Kingma, 2016).

    Afterwards each output has mean 0 and deviation 1 in every channel. The convolutions are scaled
    in the order in which `forward()` runs them. Layers that predict or upsample flow do not change.
    """

    def rescale(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(layer, nn.Conv2d | nn.ConvTranspose2d)
        assert layer.bias is not None
        transposed = isinstance(layer, nn.ConvTranspose2d)
        if transposed:
            output = F.conv_transpose2d(inputs[0], layer.weight, stride=2, padding=1)
        else:
            output = F.conv2d(inputs[0], layer.weight, None, layer.stride, layer.padding)
        deviation, mean = torch.std_mean(output.float(), dim=(0, 2, 3))
        deviation = deviation.clamp(min=1e-4)
        shape = (1, -1, 1, 1) if transposed else (-1, 1, 1, 1)
        layer.weight.div_(deviation.view(shape))
        layer.bias.copy_(-mean / deviation)

    hooks = [
        layer.register_forward_pre_hook(rescale)
        for part in parts
        for name, layer in part.named_modules()
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d)
        and "predict" not in name
        and "upflow" not in name
    ]
    with torch.no_grad():
        forward()
    for hook in hooks:
        hook.remove()


def carry_flow(block: EncoderDecoder) -> None:
    """Initialise a refining FlowNetS to pass through its input flow, averaged to each level.

    Four channels of every encoder layer carry u, -u, v and -v, which together survive LeakyReLU:
    f(x) - f(-x) = 1.1 x. Every prediction is initialised to their value, so that training
    learns a correction from the first step on.
    """

    def read(weight: Tensor, value: float) -> None:
        """Set weights [2, inputs, k, k] to read u and v from the four channels."""
        for component in (0, 1):
            weight[component, 2 * component] = value / 1.1
            weight[component, 2 * component + 1] = -value / 1.1

    with torch.no_grad():
        for name, layer in block.encoder.items():
            assert isinstance(layer, Conv)
            assert layer.bias is not None
            (step, _), middle = layer.stride, layer.kernel_size[0] // 2
            cell = slice(middle, middle + step)  # the inputs under one output
            flow = torch.zeros_like(layer.weight[:2])
            if name == "conv1":
                flow[[0, 1], FLOW_CHANNELS, cell, cell] = 1 / step**2
            else:
                read(flow[:, :, cell, cell], 1 / step**2)
            layer.weight[:4] = torch.stack((flow[0], -flow[0], flow[1], -flow[1]))
            layer.bias[:4] = 0
        for name, layer in block.decoder.named_children():
            if name.startswith("predict"):
                assert isinstance(layer, Conv)
                nn.init.zeros_(layer.weight)
                read(layer.weight[:, :, 1:2, 1:2], 1.0)


def channel_means(model: FlowNet2) -> None:
    """Set the means that the network subtracts; all are equal, as training permutes colours."""
    model.mean1.fill_(0.45)
    model.mean2.fill_(0.45)

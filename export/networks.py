"""The seventeen networks of FlowNet 2.0 (Ilg et al., CVPR 2017) with the Caffe release's semantics.

Every block exists once; a network is a line in :data:`NETWORKS`: which blocks follow each other,
and how wide they are.
"""

from dataclasses import dataclass
from fractions import Fraction

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from export.operators import (
    channel_norm,
    correlation,
    resample,
    upsample_aligned,
    upsample_nearest,
    warp,
)

FLOW_SCALE = 20.0  # C and S predict flow / 20
SD_FLOW_SCALE = 0.05  # SD predicts flow * 20
SIZE_MULTIPLE = 64  # six halvings


FULL, THIN = Fraction(1), Fraction(3, 8)


@dataclass(frozen=True)
class Network:
    """One network of the original release.

    Attributes:
        name: as the release spells it; names that differ only in case are different networks.
        cascade: "C", "S" or "SD" for each network in turn, each after the first refining the flow
            of the one before.
        width: share of the full channel counts.
        fusion: whether SD runs beside the cascade and Fusion joins both.
    """

    name: str
    cascade: tuple[str, ...]
    width: Fraction = FULL
    fusion: bool = False


NETWORKS: dict[str, Network] = {
    network.name: network
    for network in (
        Network("FlowNet2-S", ("S",)),
        Network("FlowNet2-s", ("S",), THIN),
        Network("FlowNet2-C", ("C",)),
        Network("FlowNet2-c", ("C",), THIN),
        Network("FlowNet2-SS", ("S", "S")),
        Network("FlowNet2-ss", ("S", "S"), THIN),
        Network("FlowNet2-sss", ("S", "S", "S"), THIN),
        Network("FlowNet2-CS", ("C", "S")),
        Network("FlowNet2-cs", ("C", "S"), THIN),
        Network("FlowNet2-CSS", ("C", "S", "S")),
        Network("FlowNet2-css", ("C", "S", "S"), THIN),
        Network("FlowNet2-CSS-ft-sd", ("C", "S", "S")),
        Network("FlowNet2-css-ft-sd", ("C", "S", "S"), THIN),
        Network("FlowNet2-SD", ("SD",)),
        Network("FlowNet2", ("C", "S", "S"), fusion=True),
        Network("FlowNet2-KITTI", ("C", "S", "S"), fusion=True),
        Network("FlowNet2-Sintel", ("C", "S", "S"), fusion=True),
    )
}


class Conv(nn.Conv2d):
    """Convolution, padding (k - 1) / 2, then LeakyReLU 0.1 unless ``linear``."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int = 3, stride: int = 1, linear: bool = False
    ) -> None:
        super().__init__(inputs, outputs, kernel, stride, padding=(kernel - 1) // 2)
        self.linear = linear

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        return x if self.linear else F.leaky_relu(x, 0.1)


class Deconv(nn.ConvTranspose2d):
    """Transposed convolution 4x4 to twice the size, then LeakyReLU 0.1 unless ``linear``."""

    def __init__(self, inputs: int, outputs: int, linear: bool = False) -> None:
        super().__init__(inputs, outputs, kernel_size=4, stride=2, padding=1)
        self.linear = linear

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        x = super().forward(x, output_size)
        return x if self.linear else F.leaky_relu(x, 0.1)


@dataclass(frozen=True)
class Layer:
    """One convolution of an encoder: name and, at full width, its outputs."""

    name: str
    outputs: int
    kernel: int = 3
    stride: int = 1


STEM = (Layer("conv1", 64, 7, 2), Layer("conv2", 128, 5, 2), Layer("conv3", 256, 5, 2))
TAIL = (
    Layer("conv3_1", 256),
    Layer("conv4", 512, stride=2),
    Layer("conv4_1", 512),
    Layer("conv5", 512, stride=2),
    Layer("conv5_1", 512),
    Layer("conv6", 1024, stride=2),
    Layer("conv6_1", 1024),
)
SD_ENCODER = (
    Layer("conv0", 64),
    Layer("conv1", 64, stride=2),
    Layer("conv1_1", 128),
    Layer("conv2", 128, stride=2),
    Layer("conv2_1", 128),
    Layer("conv3", 256, stride=2),
    *TAIL,
)
FUSION_ENCODER = SD_ENCODER[:5]


class Encoder(nn.ModuleDict):
    """A chain of convolutions whose every output can be taken up by name."""

    def __init__(self, layers: tuple[Layer, ...], inputs: int, width: Fraction) -> None:
        super().__init__()
        for layer in layers:
            outputs = int(layer.outputs * width)
            self[layer.name] = Conv(inputs, outputs, layer.kernel, layer.stride)
            inputs = outputs

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        features = {}
        for name, layer in self.items():
            x = features[name] = layer(x)
        return features


@dataclass(frozen=True)
class Level:
    """One resolution of a decoder, 1 / 2**number of the input's; full-width channel counts."""

    number: int
    skip: str  # the encoder's layer that joins here
    skip_channels: int
    deconv_channels: int  # also those of interconv, if the decoder has it


LEVELS = (
    Level(5, "conv5_1", 512, 512),
    Level(4, "conv4_1", 512, 256),
    Level(3, "conv3_1", 256, 128),
    Level(2, "conv2", 128, 64),
)
SD_LEVELS = (*LEVELS[:3], Level(2, "conv2_1", 128, 64))
FUSION_LEVELS = (Level(1, "conv1_1", 128, 32), Level(0, "conv0", 64, 16))


class Decoder(nn.Module):
    """From the coarsest features to flow, level by level.

    At each level the skip features, the upsampled features and the upsampled flow of the level
    below are joined (``concat``); a prediction reads them, through ``interconv`` where there is
    one.
    """

    def __init__(
        self,
        top: str,
        top_channels: int,
        levels: tuple[Level, ...],
        width: Fraction,
        interconv: bool = False,
    ) -> None:
        super().__init__()
        self.top, self.levels, self.interconv = top, levels, interconv
        channels = int(top_channels * width)
        self.add_module(f"predict{levels[0].number + 1}", Conv(channels, 2, linear=True))
        for level in levels:
            outputs = int(level.deconv_channels * width)
            self.add_module(f"deconv{level.number}", Deconv(channels, outputs))
            self.add_module(f"upflow{level.number}", Deconv(2, 2, linear=True))
            channels = int(level.skip_channels * width) + outputs + 2
            if interconv:
                self.add_module(f"interconv{level.number}", Conv(channels, outputs, linear=True))
            read = outputs if interconv else channels
            self.add_module(f"predict{level.number}", Conv(read, 2, linear=True))

    def forward(self, features: dict[str, Tensor]) -> list[Tensor]:
        concat = features[self.top]
        flows = [self.get_submodule(f"predict{self.levels[0].number + 1}")(concat)]
        for level in self.levels:
            upsampled = self.get_submodule(f"deconv{level.number}")(concat)
            upflow = self.get_submodule(f"upflow{level.number}")(flows[-1])
            concat = torch.cat((features[level.skip], upsampled, upflow), dim=1)
            read = concat
            if self.interconv:
                read = self.get_submodule(f"interconv{level.number}")(concat)
            flows.append(self.get_submodule(f"predict{level.number}")(read))
        return flows


class EncoderDecoder(nn.Module):
    """One encoder over all inputs, and its decoder: FlowNetSimple, FlowNet-SD, Fusion.

    ``[N, inputs, H, W]`` to the predictions of its levels, coarsest first, each
    ``[N, 2, H / 2**level, W / 2**level]``: levels 6 to 2 in units of 20 pixels for S, of 0.05
    pixels for SD, 2 to 0 in pixels for Fusion.
    """

    def __init__(
        self,
        layers: tuple[Layer, ...],
        inputs: int,
        levels: tuple[Level, ...],
        width: Fraction = FULL,
        interconv: bool = False,
    ) -> None:
        super().__init__()
        top = layers[-1]
        self.encoder = Encoder(layers, inputs, width)
        self.decoder = Decoder(top.name, top.outputs, levels, width, interconv)

    def forward(self, x: Tensor) -> list[Tensor]:
        flows: list[Tensor] = self.decoder(self.encoder(x))
        return flows


class FlowNetC(nn.Module):
    """FlowNetCorr: features of each image, compared by correlation.

    Two images ``[N, 3, H, W]`` to predictions as :class:`EncoderDecoder` gives them for S.
    """

    def __init__(self, width: Fraction) -> None:
        super().__init__()
        self.stem = Encoder(STEM, 3, width)
        self.conv_redir = Conv(int(256 * width), int(32 * width), kernel=1)
        self.tail = Encoder(TAIL, int(32 * width) + 441, width)
        self.decoder = Decoder("conv6_1", 1024, LEVELS, width)

    def forward(self, image1: Tensor, image2: Tensor) -> list[Tensor]:
        features1, features2 = self.stem(image1), self.stem(image2)
        cost = F.leaky_relu(correlation(features1["conv3"], features2["conv3"]), 0.1)
        joined = torch.cat((self.conv_redir(features1["conv3"]), cost), dim=1)
        flows: list[Tensor] = self.decoder(features1 | self.tail(joined))
        return flows


class FlowNet2(nn.Module):
    """A whole network, from two uint8 images to the flow between them.

    The normalisation travels with the weights: ``mean1`` and ``mean2`` are the per-channel means
    (BGR, 0..1) subtracted from each image; with ``pair_mean`` it is the mean over both images
    instead, as NVIDIA's port trains.
    """

    mean1: Tensor
    mean2: Tensor

    def __init__(self, network: Network, pair_mean: bool = False) -> None:
        super().__init__()
        self.network = network
        self.pair_mean = pair_mean
        self.register_buffer("mean1", torch.zeros(3, 1, 1))
        self.register_buffer("mean2", torch.zeros(3, 1, 1))
        blocks: dict[str, nn.Module] = {}
        for position, kind in enumerate(network.cascade, start=1):
            if kind == "C":
                blocks[f"net{position}"] = FlowNetC(network.width)
            elif kind == "S":
                inputs = 6 if position == 1 else 12
                blocks[f"net{position}"] = EncoderDecoder(
                    (*STEM, *TAIL), inputs, LEVELS, network.width
                )
        if network.fusion or network.cascade == ("SD",):
            blocks["sd"] = EncoderDecoder(SD_ENCODER, 6, SD_LEVELS, interconv=True)
        if network.fusion:
            blocks["fusion"] = EncoderDecoder(FUSION_ENCODER, 11, FUSION_LEVELS, interconv=True)
        self.blocks = nn.ModuleDict(blocks)

    def forward(self, image1: Tensor, image2: Tensor) -> Tensor:
        """``image1``, ``image2``: uint8 ``[N, H, W, 3]``, RGB. Returns float32 ``[N, H, W, 2]``."""
        height, width = image1.shape[1:3]
        adapted_height = (height + SIZE_MULTIPLE - 1) // SIZE_MULTIPLE * SIZE_MULTIPLE
        adapted_width = (width + SIZE_MULTIPLE - 1) // SIZE_MULTIPLE * SIZE_MULTIPLE
        first, second = self.normalise(image1, image2)
        flow = self.estimate(
            resample(first, adapted_height, adapted_width),
            resample(second, adapted_height, adapted_width),
        )
        flow = resample(flow, height, width)
        scale = torch.stack(
            (torch.tensor(width / adapted_width), torch.tensor(height / adapted_height))
        )
        return flow.permute(0, 2, 3, 1) * scale.to(flow)

    def normalise(self, image1: Tensor, image2: Tensor) -> tuple[Tensor, Tensor]:
        """uint8 RGB ``[N, H, W, 3]`` to mean-free BGR ``[N, 3, H, W]``, 0..1 before the mean."""
        # To float before anything else: TensorRT takes uint8 as an input, and only casts it.
        first, second = (x.float().flip(-1).permute(0, 3, 1, 2) / 255 for x in (image1, image2))
        mean1, mean2 = self.mean1, self.mean2
        if self.pair_mean:
            mean1 = mean2 = torch.cat((first, second), dim=3).mean(dim=(2, 3), keepdim=True)
        return first - mean1, second - mean2

    def predict(self, block: str, *inputs: Tensor) -> Tensor:
        """The finest prediction of a block.

        With half-precision weights only the blocks run in half precision: images, flow and what
        warps by it stay float32, whose coordinates half precision could not tell apart.
        """
        dtype = next(self.parameters()).dtype
        finest: Tensor = self.blocks[block](*(x.to(dtype) for x in inputs))[-1]
        return finest.float()

    def estimate(self, image1: Tensor, image2: Tensor) -> Tensor:
        """Normalised images ``[N, 3, H, W]``, H and W multiples of 64, to flow ``[N, 2, H, W]``."""
        pair = torch.cat((image1, image2), dim=1)
        if self.network.cascade == ("SD",):
            return resample(self.predict("sd", pair) * SD_FLOW_SCALE, *image1.shape[2:])

        first = (image1, image2) if self.network.cascade[0] == "C" else (pair,)
        prediction = self.predict("net1", *first)
        for position in range(2, len(self.network.cascade) + 1):
            flow = upsample_aligned(prediction * FLOW_SCALE)
            prediction = self.predict(f"net{position}", self.refiner_inputs(image1, image2, flow))
        if not self.network.fusion:
            return resample(prediction * FLOW_SCALE, *image1.shape[2:])

        flow = upsample_nearest(prediction * FLOW_SCALE)
        flow_sd = upsample_nearest(self.predict("sd", pair) * SD_FLOW_SCALE)
        fusion_inputs = (
            image1,
            flow_sd,
            flow,
            channel_norm(flow_sd),
            channel_norm(flow),
            channel_norm(image1 - warp(image2, flow_sd)),
            channel_norm(image1 - warp(image2, flow)),
        )
        return self.predict("fusion", torch.cat(fusion_inputs, dim=1))

    @staticmethod
    def refiner_inputs(image1: Tensor, image2: Tensor, flow: Tensor) -> Tensor:
        """The 12 channels that a refining S reads, from images and flow in pixels."""
        warped = warp(image2, flow)
        error = channel_norm(image1 - warped)
        return torch.cat((image1, image2, warped, flow / FLOW_SCALE, error), dim=1)

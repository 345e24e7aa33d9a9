"""Building blocks of the networks: encoders, decoders, and the sub-networks made of both."""

from dataclasses import dataclass
from fractions import Fraction

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from export.networks.catalogue import FULL
from export.networks.operators import correlation


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
    """A convolution of an encoder; ``outputs`` counts its channels at full width."""

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
    """A chain of convolutions that returns the output of each by name."""

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
    """A resolution of a decoder, 1 / 2**number of the input's, with its full-width channels.

    Attributes:
        skip: layer of the encoder that is concatenated at this level.
        deconv_channels: output channels of the deconvolution, and of interconv if there is one.
    """

    number: int
    skip: str
    skip_channels: int
    deconv_channels: int


LEVELS = (
    Level(5, "conv5_1", 512, 512),
    Level(4, "conv4_1", 512, 256),
    Level(3, "conv3_1", 256, 128),
    Level(2, "conv2", 128, 64),
)
SD_LEVELS = (*LEVELS[:3], Level(2, "conv2_1", 128, 64))
FUSION_LEVELS = (Level(1, "conv1_1", 128, 32), Level(0, "conv0", 64, 16))


class Decoder(nn.Module):
    """Predicts flow level by level, from the coarsest features.

    Each level concatenates the skip features with the upsampled features and the upsampled flow of
    the level below, and predicts flow from them, through ``interconv`` if there is one.

    Attributes:
        crop: crop upsampled features and flow to the size of the skip features, for inputs whose
            sides are not multiples of 64.
    """

    crop = False

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
            skip = features[level.skip]
            if self.crop:
                upsampled, upflow = (
                    x[:, :, : skip.shape[2], : skip.shape[3]] for x in (upsampled, upflow)
                )
            concat = torch.cat((skip, upsampled, upflow), dim=1)
            read = concat
            if self.interconv:
                read = self.get_submodule(f"interconv{level.number}")(concat)
            flows.append(self.get_submodule(f"predict{level.number}")(read))
        return flows


class EncoderDecoder(nn.Module):
    """One encoder over all inputs, and its decoder: FlowNetSimple, FlowNet-SD, Fusion.

    Maps ``[N, inputs, H, W]`` to the predictions of its levels, coarsest first, each
    ``[N, 2, H / 2**level, W / 2**level]``. S predicts levels 6 to 2 in units of 20 pixels, SD
    levels 6 to 2 in units of 0.05 pixels, and Fusion levels 2 to 0 in pixels.
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


CORRELATION = {
    "pad": 20,
    "kernel_size": 1,
    "max_displacement": 20,
    "stride1": 1,
    "stride2": 2,
}


class FlowNetC(nn.Module):
    """FlowNetCorr: compares the features of the two images by correlation.

    Maps two images ``[N, 3, H, W]`` to the same predictions as :class:`EncoderDecoder` for S.
    """

    def __init__(self, width: Fraction) -> None:
        super().__init__()
        self.stem = Encoder(STEM, 3, width)
        self.conv_redir = Conv(int(256 * width), int(32 * width), kernel=1)
        self.tail = Encoder(TAIL, int(32 * width) + 441, width)
        self.decoder = Decoder("conv6_1", 1024, LEVELS, width)

    def forward(self, image1: Tensor, image2: Tensor) -> list[Tensor]:
        features1, features2 = self.stem(image1), self.stem(image2)
        cost = F.leaky_relu(correlation(features1["conv3"], features2["conv3"], **CORRELATION), 0.1)
        joined = torch.cat((self.conv_redir(features1["conv3"]), cost), dim=1)
        flows: list[Tensor] = self.decoder(features1 | self.tail(joined))
        return flows

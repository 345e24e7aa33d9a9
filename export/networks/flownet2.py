"""A whole network, with the Caffe release's semantics."""

import torch
from torch import Tensor, nn

from export.networks.blocks import (
    FUSION_ENCODER,
    FUSION_LEVELS,
    LEVELS,
    SD_ENCODER,
    SD_LEVELS,
    STEM,
    TAIL,
    EncoderDecoder,
    FlowNetC,
)
from export.networks.catalogue import Network
from export.networks.operators import (
    channel_norm,
    resample,
    upsample_aligned,
    upsample_nearest,
    warp,
)
from flownet2.contract import SIZE_MULTIPLE

FLOW_SCALE = 20.0  # C and S predict flow / 20
SD_FLOW_SCALE = 0.05  # SD predicts flow * 20


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

    def layers(self) -> dict[tuple[str, str], nn.Conv2d | nn.ConvTranspose2d]:
        """All convolutions, by block ("net1", "sd", …) and layer ("conv3_1", "predict6", …)."""
        return {
            (name.split(".")[1], name.rpartition(".")[2]): module
            for name, module in self.named_modules()
            if isinstance(module, nn.Conv2d | nn.ConvTranspose2d)
        }

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
        first, second = (x.float().permute(0, 3, 1, 2).flip(1) / 255 for x in (image1, image2))
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

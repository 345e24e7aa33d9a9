"""A complete network, with Caffe's semantics unless its weights need different ones."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from export.networks.blocks import (
    FUSION_ENCODER,
    FUSION_LEVELS,
    LEVELS,
    SD_ENCODER,
    SD_LEVELS,
    STEM,
    TAIL,
    Decoder,
    EncoderDecoder,
    FlowNetC,
)
from export.networks.catalogue import Network
from export.networks.operators import (
    channel_norm,
    resample,
    upsample_aligned,
    upsample_nearest,
    upsample_unaligned,
    warp,
)
from export.networks.semantics import CAFFE, Semantics
from flownet2.contract import MINIMUM_SIDE, SIZE_MULTIPLE, adapted

FLOW_SCALE = 20.0  # C and S predict flow / 20
SD_FLOW_SCALE = 0.05  # SD predicts flow * 20


class FlowNet2(nn.Module):
    """A whole network, from two uint8 images to the flow between them.

    Attributes:
        mean1, mean2: per-channel means (BGR, 0..1) that are stored with the weights and subtracted
            from the images, if `semantics` says so.
    """

    mean1: Tensor
    mean2: Tensor

    def __init__(self, network: Network, semantics: Semantics = CAFFE) -> None:
        super().__init__()
        self.network = network
        self.semantics = semantics
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
        for module in self.modules():
            if isinstance(module, Decoder):
                module.crop = not semantics.resized

    def layers(self) -> dict[tuple[str, str], nn.Conv2d | nn.ConvTranspose2d]:
        """Return all convolutions by block ("net1", "sd") and layer ("conv3_1", "predict6")."""
        return {
            (name.split(".")[1], name.rpartition(".")[2]): module
            for name, module in self.named_modules()
            if isinstance(module, nn.Conv2d | nn.ConvTranspose2d)
        }

    def forward(self, image1: Tensor, image2: Tensor) -> Tensor:
        """Return float32 flow ``[N, H, W, 2]`` for uint8 RGB images ``[N, H, W, 3]``."""
        height, width = image1.shape[1:3]
        size = adapted(height), adapted(width)
        first, second = self.normalise(image1, image2)
        if self.semantics.resized:
            first, second = (resample(x, *size) for x in (first, second))
        # With half-precision weights only the blocks run in half precision. Images, flow and warp
        # stay float32: half precision cannot resolve the coordinates of the warp.
        dtype = next(self.parameters()).dtype
        flows: dict[str, Tensor] = {}
        for name, block in self.blocks.items():
            inputs = (x.to(dtype) for x in self.inputs(name, first, second, flows))
            flow = flows[name] = block(*inputs)[-1].float() * flow_scale(name)
        if not self.semantics.resized:
            flow = F.interpolate(flow, (height, width), mode="bilinear", align_corners=False)
            return flow.permute(0, 2, 3, 1)
        # Fusion's flow has the adapted size and shrinks; the others' is a quarter of it and grows.
        shrink = SIZE_MULTIPLE // MINIMUM_SIDE if self.network.fusion else 1
        flow = resample(flow, height, width, shrink)
        scale = torch.stack((torch.tensor(width / size[1]), torch.tensor(height / size[0])))
        return flow.permute(0, 2, 3, 1) * scale.to(flow)

    def normalise(self, image1: Tensor, image2: Tensor) -> tuple[Tensor, Tensor]:
        """Convert uint8 RGB ``[N, H, W, 3]`` to mean-free BGR ``[N, 3, H, W]`` in units of 255."""
        # Cast to float first: TensorRT takes uint8 as an input, but can only cast it.
        first, second = (x.float().permute(0, 3, 1, 2).flip(1) / 255 for x in (image1, image2))
        mean1, mean2 = self.mean1, self.mean2
        if self.semantics.mean == "pair":
            mean1 = mean2 = torch.cat((first, second), dim=3).mean(dim=(2, 3), keepdim=True)
        elif self.semantics.mean == "image":
            mean1, mean2 = (x.mean(dim=(2, 3), keepdim=True) for x in (first, second))
        return first - mean1, second - mean2

    def inputs(
        self, block: str, image1: Tensor, image2: Tensor, flows: Mapping[str, Tensor]
    ) -> tuple[Tensor, ...]:
        """Return the inputs of a block.

        Args:
            block: "net1", "net2", "net3", "sd" or "fusion".
            image1, image2: mean-free ``[N, 3, H, W]``, H and W multiples of 64.
            flows: finest prediction of each previous block, ``[N, 2, H / 4, W / 4]`` in pixels of
                the images.

        Returns:
            The two images for C, their 6 channels together for a first S and SD, 12 channels for a
            refining S, 11 for Fusion.
        """
        edge = self.semantics.edge_warp
        if block == "net1" and self.network.cascade[0] == "C":
            return image1, image2
        if block in ("net1", "sd"):
            return (torch.cat((image1, image2), dim=1),)
        if block == "fusion":
            flow_sd = upsample_nearest(flows["sd"])
            flow = upsample_nearest(flows[f"net{len(self.network.cascade)}"])
            fusion_inputs = (
                image1,
                flow_sd,
                flow,
                channel_norm(flow_sd),
                channel_norm(flow),
                channel_norm(image1 - warp(image2, flow_sd, edge)),
                channel_norm(image1 - warp(image2, flow, edge)),
            )
            return (torch.cat(fusion_inputs, dim=1),)
        upsample = upsample_aligned if self.semantics.aligned else upsample_unaligned
        flow = upsample(flows[f"net{int(block.removeprefix('net')) - 1}"])
        warped = warp(image2, flow, edge)
        error = channel_norm(image1 - warped)
        return (torch.cat((image1, image2, warped, flow / FLOW_SCALE, error), dim=1),)


def flow_scale(block: str) -> float:
    """Return the unit of a block's predictions, in pixels."""
    return {"sd": SD_FLOW_SCALE, "fusion": 1.0}.get(block, FLOW_SCALE)

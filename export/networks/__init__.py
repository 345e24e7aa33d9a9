"""The FlowNet 2.0 networks in PyTorch.

Every block exists once; a network is a line in :data:`NETWORKS`: which blocks follow each other,
and how wide they are.
"""

from export.networks.blocks import Conv, EncoderDecoder, FlowNetC
from export.networks.catalogue import NETWORKS, Network
from export.networks.flownet2 import FlowNet2, flow_scale

__all__ = [
    "NETWORKS",
    "Conv",
    "EncoderDecoder",
    "FlowNet2",
    "FlowNetC",
    "Network",
    "flow_scale",
]

"""The FlowNet 2.0 networks in PyTorch.

Every block exists once; a network is a line in :data:`NETWORKS`: which blocks follow each other,
and how wide they are.
"""

from export.networks.blocks import Conv, EncoderDecoder, FlowNetC
from export.networks.catalogue import NETWORKS, Network
from export.networks.flownet2 import FLOW_SCALE, SD_FLOW_SCALE, FlowNet2

__all__ = [
    "FLOW_SCALE",
    "NETWORKS",
    "SD_FLOW_SCALE",
    "Conv",
    "EncoderDecoder",
    "FlowNet2",
    "FlowNetC",
    "Network",
]

"""The FlowNet 2.0 networks in PyTorch.

Every block exists once; a network is a line in :data:`NETWORKS` that gives the order and the width
of its blocks.
"""

from export.networks.blocks import Conv, EncoderDecoder, FlowNetC
from export.networks.catalogue import NETWORKS, Network
from export.networks.flownet2 import FlowNet2, flow_scale
from export.networks.semantics import CAFFE, Semantics

__all__ = [
    "CAFFE",
    "NETWORKS",
    "Conv",
    "EncoderDecoder",
    "FlowNet2",
    "FlowNetC",
    "Network",
    "Semantics",
    "flow_scale",
]

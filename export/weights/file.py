"""Result of every reader: the layers of a weights file, by the names in the file."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from export.networks import CAFFE, Network, Semantics
from flownet2.errors import Error

AUTHORS_LICENSE = "research only (FlowNet 2.0 release)"


class WeightsError(Error):
    """Raised for a weights file that cannot be read, or that holds another network."""


@dataclass
class Layer:
    """A layer as the file stores it; ``bias`` may be missing."""

    weight: Tensor
    bias: Tensor | None = None


@dataclass
class WeightFile:
    """Contents of a weights file.

    Attributes:
        names: returns the names of a layer of a network's block in this kind of file.
        source: where the weights come from.
        description: kind of file and special features of its network, for the log.
        mean1, mean2: stored per-channel means (BGR, 0..1); None if `semantics` computes them.
        rgb: whether the first convolutions read RGB.
        summed_correlation: whether FlowNetC's correlation is the sum over channels, not the mean.
        units: pixels in a unit of a block's predictions, if it differs from
            :func:`export.networks.flow_scale`.
    """

    layers: dict[str, Layer]
    names: Callable[[Network, str, str], tuple[str, ...]]
    source: str
    license: str
    description: str
    mean1: Tensor | None = None
    mean2: Tensor | None = None
    rgb: bool = False
    summed_correlation: bool = False
    units: Mapping[str, float] = field(default_factory=dict)
    semantics: Semantics = CAFFE

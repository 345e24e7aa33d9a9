"""What every reader makes of a weights file: layers by the names that the file uses."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from export.networks import Network

AUTHORS_LICENSE = "research only (FlowNet 2.0 release)"


class WeightsError(ValueError):
    """A weights file that cannot be read, or that holds another network; the text says which."""


@dataclass
class Layer:
    """One layer as a file has it; ``bias`` may be absent."""

    weight: Tensor
    bias: Tensor | None = None


@dataclass
class WeightFile:
    """What a file holds.

    Attributes:
        names: the names under which this kind of file keeps a layer of a network's block.
        mean1, mean2: stored per-channel means (BGR, 0..1), None where the pair's mean is meant.
    """

    layers: dict[str, Layer]
    names: Callable[[Network, str, str], tuple[str, ...]]
    source: str
    license: str
    mean1: Tensor | None = None
    mean2: Tensor | None = None
    rgb: bool = False

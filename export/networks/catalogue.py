"""The seventeen networks of FlowNet 2.0 (Ilg et al., CVPR 2017): a line each."""

from dataclasses import dataclass
from fractions import Fraction

FULL, THIN = Fraction(1), Fraction(3, 8)


@dataclass(frozen=True)
class Network:
    """A network of the original release.

    Attributes:
        name: as the release spells it; names that differ only in case are different networks.
        cascade: kind of each network in order: "C", "S" or "SD". Each network after the first
            refines the flow of the previous network.
        width: fraction of the full channel counts.
        fusion: whether SD runs beside the cascade and Fusion joins both.
    """

    name: str
    cascade: tuple[str, ...]
    width: Fraction = FULL
    fusion: bool = False

    @property
    def alone(self) -> bool:
        """True if a single C, S or SD is the whole network."""
        return len(self.cascade) == 1 and not self.fusion


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

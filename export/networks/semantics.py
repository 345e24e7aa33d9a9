"""How the framework that trained a network treats images and flow around its convolutions."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Semantics:
    """What differs between the frameworks that train FlowNet networks; the defaults are Caffe's.

    Attributes:
        mean: per-channel mean subtracted from the images: "stored" with the weights, of all pixels
            of the "pair", or of each "image".
        edge_warp: the warp clamps points outside the image to its edge; Caffe's returns zero.
        aligned: flow is upsampled between the networks with the corners aligned, not the pixels'
            centres.
        resized: images are resized to multiples of 64; otherwise the decoders crop what they
            upsample to the size of the encoder's features.
    """

    mean: Literal["stored", "pair", "image"] = "stored"
    edge_warp: bool = False
    aligned: bool = True
    resized: bool = True

    def metadata(self) -> dict[str, str]:
        """Return what differs from Caffe's semantics, as metadata of an ONNX file."""
        entries = {
            "mean": (self.mean, "stored"),
            "warp": ("edge" if self.edge_warp else "zero", "zero"),
            "upsampling": ("aligned" if self.aligned else "unaligned", "aligned"),
            "fit": ("resize" if self.resized else "crop", "resize"),
        }
        return {key: value for key, (value, caffe) in entries.items() if value != caffe}


CAFFE = Semantics()

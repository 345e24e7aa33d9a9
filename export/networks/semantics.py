"""Treatment of images and flow around the convolutions, by the framework that trained a network."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Semantics:
    """Differences between the frameworks that train FlowNet networks; the defaults are Caffe's.

    Attributes:
        mean: per-channel mean subtracted from the images: "stored" with the weights, of all pixels
            of the "pair", or of each "image".
        edge_warp: the warp clamps points outside the image to its edge; Caffe's returns zero.
        aligned: flow is upsampled between the networks with aligned corners; otherwise with aligned
            centres of the pixels.
        resized: images are resized to multiples of 64; otherwise the decoders crop upsampled
            features and flow to the size of the encoder's features.
    """

    mean: Literal["stored", "pair", "image"] = "stored"
    edge_warp: bool = False
    aligned: bool = True
    resized: bool = True

    def metadata(self) -> dict[str, str]:
        """Return the differences from Caffe's semantics, as metadata of an ONNX file."""
        entries = {
            "mean": (self.mean, "stored"),
            "warp": ("edge" if self.edge_warp else "zero", "zero"),
            "upsampling": ("aligned" if self.aligned else "unaligned", "aligned"),
            "fit": ("resize" if self.resized else "crop", "resize"),
        }
        return {key: value for key, (value, caffe) in entries.items() if value != caffe}


CAFFE = Semantics()

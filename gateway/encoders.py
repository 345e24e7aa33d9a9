"""Encoders of the response: the formats on offer and the content codings."""

import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import orjson
import pybase64
import zstandard
from isal import isal_zlib
from PIL import Image

from flownet2 import png
from flownet2.colours import colours
from flownet2.formats import (
    Flow,
    FormatError,
    Mask,
    to_flo,
    to_kitti,
    to_npy,
    to_npz,
)
from gateway.errors import NotAcceptable

JSON = "application/json"


@dataclass(frozen=True)
class Estimate:
    """Content of a response: one flow, or the flows of both directions and the occlusion mask.

    Attributes:
        flow: in pixels of the original images, on the grid that the client asked for.
        scale: back factors of x and y.
        flow_backward: from the second image to the first, with both directions.
        occluded: pixels of the first image that are hidden in the second, with both directions.
    """

    flow: Flow
    scale: tuple[float, float]
    flow_backward: Flow | None = None
    occluded: Mask | None = None

    def fields(self) -> dict[str, Any]:
        """Return the fields of the JSON and .npz responses."""
        scale_x, scale_y = self.scale
        both = {"flow_backward": self.flow_backward, "occluded": self.occluded}
        return {
            "flow": self.flow,
            "scale_x_back_factor": scale_x,
            "scale_y_back_factor": scale_y,
            **{name: value for name, value in both.items() if value is not None},
        }


@dataclass(frozen=True)
class Format:
    """A format of the response."""

    media_type: str
    description: str
    encode: Callable[[Estimate], bytes]
    both_directions: bool = False
    compressible: bool = False


def to_json(estimate: Estimate) -> bytes:
    """Encode as the contract's JSON, each number with as few digits as float32 needs."""
    fields = estimate.fields()
    if estimate.occluded is not None:
        file = io.BytesIO()
        Image.fromarray(estimate.occluded).save(file, "PNG")  # 1 bit per pixel
        fields["occluded"] = pybase64.b64encode_as_string(file.getbuffer())
    return orjson.dumps(fields, option=orjson.OPT_SERIALIZE_NUMPY)


def _kitti(estimate: Estimate) -> bytes:
    """Encode as KITTI's PNG; raise NotAcceptable if a vector is too long for it."""
    try:
        return to_kitti(estimate.flow)
    except FormatError as error:
        raise NotAcceptable(f"{str(error)[0].upper()}{str(error)[1:]}.", field="Accept") from error


def to_picture(estimate: Estimate) -> bytes:
    """Encode as a picture. ISA-L compresses it ten times as fast as zlib, and no worse."""
    return png.encode(colours(estimate.flow), deflate=isal_zlib.compress)


# In order of preference among formats that a client accepts equally. `image/*` is a browser's or a
# viewer's: the picture comes before KITTI's PNG, which looks like noise.
FORMATS = {
    format.media_type: format
    for format in (
        Format(
            JSON,
            "JSON, as from the FlowNet2 Docker image's service",
            to_json,
            both_directions=True,
            compressible=True,
        ),
        Format(
            "application/x-npy",
            "NumPy .npy, float32 [height, width, 2]",
            lambda estimate: to_npy(estimate.flow),
        ),
        Format(
            "application/x-npz",
            "NumPy .npz with the fields of the JSON, `occluded` as bool",
            lambda estimate: to_npz(**estimate.fields()),
            both_directions=True,
        ),
        Format("application/x-flo", "Middlebury .flo", lambda estimate: to_flo(estimate.flow)),
        Format(
            "image/png",
            "picture in Middlebury's colours",
            to_picture,
        ),
        Format("image/x-kitti-flow", "KITTI 16-bit PNG", _kitti),
    )
}

# At these levels compression takes less time than it saves on a network of 1 Gbit/s: both compress
# 5 MB of JSON to half in about 20 ms. zlib's own level 1 takes 70 ms and compresses no better.
ENCODINGS: dict[str, Callable[[bytes], bytes]] = {
    "zstd": lambda data: zstandard.ZstdCompressor(level=1).compress(data),
    "gzip": lambda data: isal_zlib.compress(data, 1, wbits=31),
}

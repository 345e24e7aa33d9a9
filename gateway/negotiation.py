"""What format a client gets: `Accept`, `Accept-Encoding`, and the formats on offer (RFC 9110)."""

import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import orjson
import pybase64
import zstandard
from isal import isal_zlib
from PIL import Image

from flownet2.formats import (
    Flow,
    FormatError,
    Mask,
    to_flo,
    to_kitti,
    to_npy,
    to_npz,
    to_picture,
)
from gateway.errors import NotAcceptable

JSON = "application/json"


@dataclass(frozen=True)
class Estimate:
    """What a response holds: one flow, or those of both directions and the occluded pixels.

    The flows are in pixels of the original images, on the grid that was asked for; `scale` holds
    the back factors of x and y.
    """

    flow: Flow
    scale: tuple[float, float]
    flow_backward: Flow | None = None
    occluded: Mask | None = None

    def fields(self) -> dict[str, Any]:
        """Names and values, those of both directions only where there are both."""
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
    """One format of an estimate in a response."""

    media_type: str
    description: str
    encode: Callable[[Estimate], bytes]
    both_directions: bool = False
    compressible: bool = False


def to_json(estimate: Estimate) -> bytes:
    """The contract's JSON, each number as short as float32 allows."""
    fields = estimate.fields()
    if estimate.occluded is not None:
        file = io.BytesIO()
        Image.fromarray(estimate.occluded).save(file, "PNG")  # 1 bit a pixel
        fields["occluded"] = pybase64.b64encode_as_string(file.getbuffer())
    return orjson.dumps(fields, option=orjson.OPT_SERIALIZE_NUMPY)


def _kitti(estimate: Estimate) -> bytes:
    """Encode as KITTI's PNG; raise NotAcceptable if a vector is too long for it."""
    try:
        return to_kitti(estimate.flow)
    except FormatError as error:
        raise NotAcceptable(f"{str(error)[0].upper()}{str(error)[1:]}.", field="Accept") from error


# In order of preference, where a client accepts several equally.
FORMATS = {
    format.media_type: format
    for format in (
        Format(
            JSON,
            "JSON, as the service that this one replaces",
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
            "NumPy .npz of all that the JSON holds, by the same names, `occluded` as bool",
            lambda estimate: to_npz(**estimate.fields()),
            both_directions=True,
        ),
        Format("application/x-flo", "Middlebury .flo", lambda estimate: to_flo(estimate.flow)),
        Format("image/x-kitti-flow", "KITTI 16-bit PNG", _kitti),
        Format(
            "image/png",
            "picture in Middlebury's colours",
            lambda estimate: to_picture(estimate.flow),
        ),
    )
}

# Levels that cost less time than they save on a network of 1 Gbit/s: 5 MB of JSON take about
# 20 ms with either and shrink to half. zlib's own level 1 takes 70 ms for no better result.
ENCODINGS: dict[str, Callable[[bytes], bytes]] = {
    "zstd": lambda data: zstandard.ZstdCompressor(level=1).compress(data),
    "gzip": lambda data: isal_zlib.compress(data, 1, wbits=31),
}


def _weights(header: str) -> dict[str, float]:
    """Parse `Accept` or `Accept-Encoding`: range -> q (0 for no number from 0 to 1)."""
    weights = {}
    for part in header.split(","):
        name, *parameters = (piece.strip().lower() for piece in part.split(";"))
        quality = next((p[2:].strip() for p in parameters if p.startswith("q=")), "1")
        try:
            weight = float(quality)
        except ValueError:
            weight = 0.0
        weights[name] = weight if 0 <= weight <= 1 else 0.0
    return weights


def choose_format(accept: str, both_directions: bool) -> Format:
    """The format on offer that an `Accept` header prefers; JSON for an empty one.

    Raises:
        NotAcceptable: it accepts none, or none that can hold both directions where it is to.
    """
    if not accept.strip():
        return FORMATS[JSON]
    weights = _weights(accept)

    def weight(media_type: str) -> float:
        group = media_type.partition("/")[0]
        ranges = (media_type, f"{group}/*", "*/*")
        return next((weights[name] for name in ranges if name in weights), 0.0)

    offered = [name for name, one in FORMATS.items() if one.both_directions or not both_directions]
    best = max(offered, key=weight)
    if not weight(best) > 0:
        condition = "With direction=both accept" if both_directions else "Accept"
        raise NotAcceptable(f"{condition} one of {', '.join(offered)}.", field="Accept")
    return FORMATS[best]


def choose_encoding(accept_encoding: str) -> str | None:
    """The content coding that an `Accept-Encoding` header prefers, None for no coding.

    One that is as welcome as no coding is taken, and `identity` is the last choice where it is
    not named.
    """
    weights = _weights(accept_encoding)

    def weight(coding: str) -> float:
        return weights.get(coding, weights.get("*", 0.0))

    best = max(ENCODINGS, key=weight)
    return best if weight(best) > 0 and weight(best) >= weight("identity") else None

"""What format a client gets: `Accept`, `Accept-Encoding`, and the formats on offer (RFC 9110)."""

from collections.abc import Callable
from dataclasses import dataclass

import orjson
import zstandard
from isal import isal_zlib

from flownet2.formats import Flow, to_flo, to_kitti, to_npy, to_picture
from gateway.errors import NotAcceptable

JSON = "application/json"


@dataclass(frozen=True)
class Format:
    """One format of a flow in a response."""

    media_type: str
    description: str
    encode: Callable[[Flow, float, float], bytes]
    compressible: bool = False


def to_json(flow: Flow, scale_x: float, scale_y: float) -> bytes:
    """The contract's JSON, each number as short as float32 allows."""
    return orjson.dumps(
        {"flow": flow, "scale_x_back_factor": scale_x, "scale_y_back_factor": scale_y},
        option=orjson.OPT_SERIALIZE_NUMPY,
    )


# In order of preference, where a client likes several equally.
FORMATS = {
    format.media_type: format
    for format in (
        Format(JSON, "JSON, as the service that this one replaces", to_json, compressible=True),
        Format(
            "application/x-npy",
            "NumPy .npy, float32 [height, width, 2]",
            lambda flow, _x, _y: to_npy(flow),
        ),
        Format("application/x-flo", "Middlebury .flo", lambda flow, _x, _y: to_flo(flow)),
        Format("image/x-kitti-flow", "KITTI 16-bit PNG", lambda flow, _x, _y: to_kitti(flow)),
        Format(
            "image/png",
            "picture in Middlebury's colours",
            lambda flow, _x, _y: to_picture(flow),
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


def choose_format(accept: str) -> Format:
    """The format on offer that an `Accept` header likes best; JSON for an empty one.

    Raises:
        NotAcceptable: it likes none.
    """
    if not accept.strip():
        return FORMATS[JSON]
    weights = _weights(accept)

    def weight(media_type: str) -> float:
        group = media_type.partition("/")[0]
        ranges = (media_type, f"{group}/*", "*/*")
        return next((weights[name] for name in ranges if name in weights), 0.0)

    best = max(FORMATS, key=weight)
    if not weight(best) > 0:
        raise NotAcceptable(f"Accept one of {', '.join(FORMATS)}.", field="Accept")
    return FORMATS[best]


def choose_encoding(accept_encoding: str) -> str | None:
    """The content coding that an `Accept-Encoding` header likes best, None for no coding.

    One that it likes as much as no coding is taken, and `identity` is the last choice where it is
    not named.
    """
    weights = _weights(accept_encoding)

    def weight(coding: str) -> float:
        return weights.get(coding, weights.get("*", 0.0))

    best = max(ENCODINGS, key=weight)
    return best if weight(best) > 0 and weight(best) >= weight("identity") else None

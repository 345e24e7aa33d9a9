"""Content negotiation (RFC 9110) by `Accept` and `Accept-Encoding`."""

from gateway.encoders import ENCODINGS, FORMATS, JSON, Format
from gateway.errors import NotAcceptable


def _weights(header: str) -> dict[str, float]:
    """Parse `Accept` or `Accept-Encoding` to weights by range; an invalid weight counts as 0."""
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
    """Return the format that an `Accept` header prefers, JSON for an empty header.

    Raises:
        NotAcceptable: it accepts no format, or none that holds both directions if that is needed.
    """
    if not accept.strip():
        return FORMATS[JSON]
    weights = _weights(accept)

    def weight(media_type: str) -> float:
        group = media_type.partition("/")[0]
        ranges = (media_type, f"{group}/*", "*/*")
        return next((weights[name] for name in ranges if name in weights), 0.0)

    offered = [name for name, x in FORMATS.items() if x.both_directions or not both_directions]
    best = max(offered, key=weight)
    if not weight(best) > 0:
        condition = "With direction=both accept" if both_directions else "Accept"
        raise NotAcceptable(f"{condition} one of {', '.join(offered)}.", field="Accept")
    return FORMATS[best]


def choose_encoding(accept_encoding: str) -> str | None:
    """Return the content coding that an `Accept-Encoding` header prefers, or None.

    A coding is used if its weight is at least that of `identity`, which is 0 if the header does not
    name it.
    """
    weights = _weights(accept_encoding)

    def weight(coding: str) -> float:
        return weights.get(coding, weights.get("*", 0.0))

    best = max(ENCODINGS, key=weight)
    return best if weight(best) > 0 and weight(best) >= weight("identity") else None

"""Parts of the OpenAPI document that FastAPI cannot derive: errors, request body, response."""

from typing import Any

from gateway.encoders import FORMATS, JSON
from gateway.errors import MEDIA_TYPE, GatewayError
from gateway.fields import FORM_FIELDS, JSON_FIELDS, MULTIPART

SCALE_HEADERS = ("X-Scale-X-Back-Factor", "X-Scale-Y-Back-Factor")

# A black PNG of 16x16 pixels, so that the example returns a flow.
_EXAMPLE = (
    "iVBORw0KGgoAAAANSUhEUgAAABAAAAAQCAAAAAA6mKC9AAAA"
    "DUlEQVR42mNgGAXIAAABEAABf80DtQAAAABJRU5ErkJggg=="
)


def error_responses(*causes: type[GatewayError]) -> dict[int | str, dict[str, Any]]:
    """Return OpenAPI's `responses` for these causes, with an example of each."""
    responses: dict[int | str, dict[str, Any]] = {}
    for cause in causes:
        example = cause.problem(cause.__doc__ or "", None, "8a2f0c51d7e94b36")
        response = responses.setdefault(
            cause.status,
            {
                "description": "",
                "content": {
                    MEDIA_TYPE: {
                        "schema": {"$ref": "#/components/schemas/Problem"},
                        "examples": {},
                    }
                },
            },
        )
        response["description"] = " ".join(filter(None, (response["description"], cause.__doc__)))
        response["content"][MEDIA_TYPE]["examples"][cause.slug] = {
            "summary": example.title,
            "value": example.model_dump(exclude_none=True),
        }
    return responses


def _images(fields: tuple[str, ...], kind: dict[str, Any]) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": dict.fromkeys(fields, kind),
        "required": list(fields),
        "additionalProperties": False,
    }


FLOW_REQUEST = {
    "required": True,
    "description": "Two images of the same size. JSON is also accepted under the types that "
    "clients send by default, such as that of `curl -d`, or without a type. The body may be "
    "compressed with gzip, deflate or zstd (`Content-Encoding`).",
    "content": {
        JSON: {
            "schema": _images(
                JSON_FIELDS,
                {
                    "type": "string",
                    "format": "byte",
                    "minLength": 1,
                    "description": "an image file in base64, plain or URL-safe, or a data URL",
                },
            ),
            "example": dict.fromkeys(JSON_FIELDS, _EXAMPLE),
        },
        MULTIPART: {"schema": _images(FORM_FIELDS, {"type": "string", "format": "binary"})},
    },
}
"""The request body of `/estimate_flow/`."""

_FACTOR = {"type": "number", "exclusiveMinimum": 0}
_VECTOR = {"type": "array", "items": {"type": "number"}, "minItems": 2, "maxItems": 2}
_FLOW = {"type": "array", "items": {"type": "array", "items": _VECTOR}}
_BINARY = {"schema": {"type": "string", "format": "binary"}}

FLOW_RESPONSE = {
    "description": "The flow, in the format that `Accept` asks for. "
    + "; ".join(f"`{name}`: {format.description}" for name, format in FORMATS.items())
    + ".",
    "headers": {name: {"schema": _FACTOR, "required": True} for name in SCALE_HEADERS},
    "content": dict.fromkeys(FORMATS, _BINARY)
    | {
        JSON: {
            "schema": {
                "type": "object",
                "required": ["flow", "scale_x_back_factor", "scale_y_back_factor"],
                "properties": {
                    "flow": _FLOW | {"description": "[height][width][u to the right, v down]"},
                    "scale_x_back_factor": _FACTOR | {"description": "width / 512"},
                    "scale_y_back_factor": _FACTOR | {"description": "height / 512"},
                    "flow_backward": _FLOW
                    | {"description": "with `direction=both`: from the second image to the first"},
                    "occluded": {
                        "type": "string",
                        "format": "byte",
                        "description": "with `direction=both`: a PNG of 1 bit a pixel, in base64, "
                        "white at the pixels of the first image that the second does not show",
                    },
                },
            },
            "example": {
                "flow": [[[-0.4425, 0.1344], [-0.5788, 0.4257]]],
                "scale_x_back_factor": 4.0,
                "scale_y_back_factor": 4.0,
            },
        }
    },
}
"""The response of `/estimate_flow/`, in every format."""

"""What the OpenAPI document says beyond what FastAPI reads off the routes.

`python -m gateway.openapi` prints the document; the repository holds it as `openapi.json`.
"""

from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel, Field

from gateway.errors import KINDS, MEDIA_TYPE, GatewayError
from gateway.flow import SCALE_HEADERS
from gateway.negotiation import FORMATS, JSON
from gateway.settings import Settings

# A black PNG of 16x16 pixels: whoever tries the example gets a flow.
_EXAMPLE = (
    "iVBORw0KGgoAAAANSUhEUgAAABAAAAAQCAAAAAA6mKC9AAAA"
    "DUlEQVR42mNgGAXIAAABEAABf80DtQAAAABJRU5ErkJggg=="
)


class Problem(BaseModel):
    """An error, as RFC 9457 has it."""

    type: str = Field(description="stable name of the cause")
    title: str = Field(description="the cause in words")
    status: int = Field(description="HTTP status")
    detail: str = Field(description="what is wrong with this request, and what to change")
    field: str | None = Field(None, description="field, parameter or header that it is about")
    request_id: str = Field(description="the request's `X-Request-ID`")


def errors(*causes: type[GatewayError]) -> dict[int | str, dict[str, Any]]:
    """OpenAPI's `responses` that declare these causes, with an example of each."""
    responses: dict[int | str, dict[str, Any]] = {}
    for cause in causes:
        kind = KINDS[cause]
        response = responses.setdefault(
            kind.status,
            {
                "description": kind.title,
                "content": {
                    MEDIA_TYPE: {
                        "schema": {"$ref": "#/components/schemas/Problem"},
                        "examples": {},
                    }
                },
            },
        )
        if kind.title not in response["description"]:
            response["description"] += f"; {kind.title[0].lower()}{kind.title[1:]}"
        response["content"][MEDIA_TYPE]["examples"][kind.slug] = {
            "summary": cause.__doc__,
            "value": {
                "type": kind.type,
                "title": kind.title,
                "status": kind.status,
                "detail": cause.__doc__,
                "request_id": "8a2f0c51d7e94b36",
            },
        }
    return responses


def flow_request() -> dict[str, Any]:
    """The request body of `/estimate_flow/`."""

    def schema(fields: tuple[str, ...], kind: dict[str, Any]) -> dict[str, Any]:
        return {
            "type": "object",
            "properties": dict.fromkeys(fields, kind),
            "required": list(fields),
            "additionalProperties": False,
        }

    return {
        "required": True,
        "description": "Two images of one size. JSON is read under any of the types that clients "
        "send without saying so (`curl -d`, none at all).",
        "content": {
            JSON: {
                "schema": schema(
                    ("image1_base64", "image2_base64"),
                    {
                        "type": "string",
                        "format": "byte",
                        "minLength": 1,
                        "description": "an image file in base64: plain or URL-safe, also with the "
                        "prefix of a data URL",
                    },
                ),
                "example": {"image1_base64": _EXAMPLE, "image2_base64": _EXAMPLE},
            },
            "multipart/form-data": {
                "schema": schema(("image1", "image2"), {"type": "string", "format": "binary"})
            },
        },
    }


def flow_response() -> dict[str, Any]:
    """Its answer, in every format."""
    vector = {"type": "array", "items": {"type": "number"}, "minItems": 2, "maxItems": 2}
    flow = {"type": "array", "items": {"type": "array", "items": vector}}
    factor = {"type": "number", "exclusiveMinimum": 0}
    binary = {"schema": {"type": "string", "format": "binary"}}
    content: dict[str, Any] = dict.fromkeys(FORMATS, binary) | {
        JSON: {
            "schema": {
                "type": "object",
                "required": ["flow", "scale_x_back_factor", "scale_y_back_factor"],
                "properties": {
                    "flow": flow | {"description": "[height][width][u to the right, v down]"},
                    "scale_x_back_factor": factor | {"description": "width / 512"},
                    "scale_y_back_factor": factor | {"description": "height / 512"},
                },
            },
            "example": {
                "flow": [[[-0.4425, 0.1344], [-0.5788, 0.4257]]],
                "scale_x_back_factor": 4.0,
                "scale_y_back_factor": 4.0,
            },
        }
    }
    formats = "; ".join(f"`{name}`: {form.description}" for name, form in FORMATS.items())
    return {
        "description": f"The flow, in the format that `Accept` asks for. {formats}.",
        "headers": {name: {"schema": factor, "required": True} for name in SCALE_HEADERS},
        "content": content,
    }


def declare_problem(app: FastAPI) -> None:
    """Put the schema of errors, which no route returns as a model, into the OpenAPI document."""
    generate = app.openapi

    def openapi() -> dict[str, Any]:
        document = generate()
        schemas = document.setdefault("components", {}).setdefault("schemas", {})
        schemas["Problem"] = Problem.model_json_schema()
        for path in document["paths"].values():
            for operation in path.values():
                responses = operation["responses"]
                validation = responses.get("422", {}).get("content", {})
                if "HTTPValidationError" in str(validation.get(JSON)):
                    del validation[JSON]
        schemas.pop("HTTPValidationError", None)
        schemas.pop("ValidationError", None)
        return document

    app.openapi = openapi  # type: ignore[method-assign]


if __name__ == "__main__":
    import orjson

    from gateway.app import create_app

    document = create_app(Settings()).openapi()
    print(orjson.dumps(document, option=orjson.OPT_INDENT_2).decode())

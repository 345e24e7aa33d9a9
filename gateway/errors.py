"""Errors of the API, one class per cause. OpenAPI lists them from here.

Responses are problem details (RFC 9457): `type` never changes, `detail` is written for people.
"""

from http import HTTPStatus
from typing import ClassVar

from pydantic import BaseModel, Field
from starlette.responses import Response

from flownet2.errors import Error

MEDIA_TYPE = "application/problem+json"


class Problem(BaseModel):
    """Body of an error response (RFC 9457)."""

    type: str = Field(description="stable name of the cause")
    title: str = Field(description="the cause in words")
    status: int = Field(description="HTTP status")
    detail: str = Field(description="what is wrong with this request, and what to change")
    field: str | None = Field(None, description="field, parameter or header at fault")
    request_id: str = Field(description="the request's `X-Request-ID`")


class GatewayError(Error):
    """Base class of the API's errors. The docstring of a subclass is the title of its problem.

    Args:
        detail: what is wrong and what to change, in a sentence or two.
        field: the field, parameter or header at fault.
        headers: headers of the response.
    """

    status: ClassVar[int]
    slug: ClassVar[str]
    of_flow: ClassVar[bool]
    """True if the OpenAPI document declares the error for `/estimate_flow/`."""

    def __init_subclass__(cls, *, status: int, slug: str, of_flow: bool = True) -> None:
        cls.status, cls.slug, cls.of_flow = status, slug, of_flow

    def __init__(
        self, detail: str, *, field: str | None = None, headers: dict[str, str] | None = None
    ) -> None:
        super().__init__(detail)
        self.detail = detail
        self.field = field
        self.headers = headers or {}

    @classmethod
    def problem(cls, detail: str, field: str | None, request_id: str) -> Problem:
        """Return the body of the error's response."""
        return Problem(
            type=f"urn:problem-type:flownet2:{cls.slug}",
            title=(cls.__doc__ or "").rstrip("."),
            status=cls.status,
            detail=detail,
            field=field,
            request_id=request_id,
        )

    def response(self, request_id: str, retry_after_s: int) -> Response:
        """Return the response, `application/problem+json`."""
        content = self.problem(self.detail, self.field, request_id)
        headers = dict(self.headers)
        if self.status == HTTPStatus.SERVICE_UNAVAILABLE:
            headers["Retry-After"] = str(retry_after_s)
        return Response(
            content.model_dump_json(exclude_none=True), self.status, headers, MEDIA_TYPE
        )


class BadRequest(GatewayError, status=400, slug="bad-request", of_flow=False):
    """The request is not valid HTTP."""


class BadJson(GatewayError, status=400, slug="bad-json"):
    """The body is not a JSON object."""


class BadMultipart(GatewayError, status=400, slug="bad-multipart"):
    """The body is not a multipart form."""


class BadEncoding(GatewayError, status=400, slug="bad-encoding"):
    """The compressed body is damaged."""


class CorsRefused(GatewayError, status=400, slug="cors-refused", of_flow=False):
    """The origin is not allowed."""


class Unauthorized(GatewayError, status=401, slug="unauthorized"):
    """The API key is missing or wrong."""


class NotFound(GatewayError, status=404, slug="not-found", of_flow=False):
    """There is nothing at this path."""


class UnknownModel(GatewayError, status=404, slug="unknown-model"):
    """The model is not loaded."""


class MethodNotAllowed(GatewayError, status=405, slug="method-not-allowed"):
    """The path does not support this method."""


class NotAcceptable(GatewayError, status=406, slug="not-acceptable"):
    """The response is available in no acceptable format."""


class BodyTimeout(GatewayError, status=408, slug="body-timeout"):
    """The body arrived too slowly."""


class BodyTooLarge(GatewayError, status=413, slug="body-too-large"):
    """The body is too large."""


class ImageTooLarge(GatewayError, status=413, slug="image-too-large"):
    """An image has too many pixels."""


class UnsupportedMediaType(GatewayError, status=415, slug="unsupported-media-type"):
    """The type of the body is not supported."""


class UnsupportedImageFormat(GatewayError, status=415, slug="unsupported-image-format"):
    """The image format is not supported."""


class InvalidParameter(GatewayError, status=422, slug="invalid-parameter"):
    """A parameter is invalid."""


class MissingField(GatewayError, status=422, slug="missing-field"):
    """A field is missing."""


class UnexpectedField(GatewayError, status=422, slug="unexpected-field"):
    """A field is unknown."""


class WrongType(GatewayError, status=422, slug="wrong-type"):
    """A field is not a string."""


class BadBase64(GatewayError, status=422, slug="bad-base64"):
    """A field is not base64."""


class NotAnImage(GatewayError, status=422, slug="not-an-image"):
    """A field does not hold an image."""


class DamagedImage(GatewayError, status=422, slug="damaged-image"):
    """An image is damaged."""


class AnimatedImage(GatewayError, status=422, slug="animated-image"):
    """An image file has several frames."""


class ImageTooSmall(GatewayError, status=422, slug="image-too-small"):
    """An image is too small."""


class SizesDiffer(GatewayError, status=422, slug="sizes-differ"):
    """The images have different sizes."""


class ClientGone(GatewayError, status=499, slug="client-gone", of_flow=False):
    """The client closed the connection."""


class InternalError(GatewayError, status=500, slug="internal-error"):
    """The gateway failed because of a bug."""


class ModelFailed(GatewayError, status=502, slug="model-failed"):
    """The model failed."""


class Overloaded(GatewayError, status=503, slug="overloaded"):
    """The service is overloaded."""


class QueueFull(GatewayError, status=503, slug="queue-full"):
    """The model's queue is full."""


class InferenceUnavailable(GatewayError, status=503, slug="inference-unavailable"):
    """No Triton serves the model."""


class Stopping(GatewayError, status=503, slug="stopping", of_flow=False):
    """The service is shutting down."""


class DeadlineExceeded(GatewayError, status=504, slug="deadline-exceeded"):
    """The deadline has passed."""

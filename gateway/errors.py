"""What can go wrong with a request: one class per cause, and one table of what clients are told.

Answers are problem details (RFC 9457). `type` is stable; `detail` is for people.
"""

from dataclasses import dataclass
from http import HTTPStatus

import orjson
from starlette.responses import Response

MEDIA_TYPE = "application/problem+json"


class GatewayError(Exception):
    """A request that cannot be answered.

    Args:
        detail: what is wrong and what to change, a sentence or two.
        field: the field, parameter or header that it is about.
        headers: headers of the answer.
    """

    def __init__(
        self, detail: str, *, field: str | None = None, headers: dict[str, str] | None = None
    ) -> None:
        super().__init__(detail)
        self.detail = detail
        self.field = field
        self.headers = headers or {}


class BadRequest(GatewayError):
    """The bytes are no HTTP request."""


class BadJson(GatewayError):
    """The body is not a JSON object."""


class BadMultipart(GatewayError):
    """The body is not the multipart form that its header announces."""


class Unauthorized(GatewayError):
    """No API key, or an unknown one."""


class NotFound(GatewayError):
    """No such path."""


class UnknownModel(GatewayError):
    """No Triton has a model of this name that keeps the contract."""


class MethodNotAllowed(GatewayError):
    """The path exists, but not for this method."""


class NotAcceptable(GatewayError):
    """None of the formats in `Accept` can be produced."""


class BodyTimeout(GatewayError):
    """The body did not arrive before the deadline."""


class BodyTooLarge(GatewayError):
    """The body is longer than the limit."""


class ImageTooLarge(GatewayError):
    """An image has more pixels than the limit."""


class UnsupportedMediaType(GatewayError):
    """The body is neither JSON nor a multipart form, or it is compressed."""


class UnsupportedImageFormat(GatewayError):
    """An image is of a known format that is not accepted."""


class InvalidParameter(GatewayError):
    """A query parameter or a header holds something that it cannot hold."""


class MissingField(GatewayError):
    """An image is missing."""


class UnexpectedField(GatewayError):
    """The request holds a field that means nothing."""


class WrongType(GatewayError):
    """A field is not a string."""


class BadBase64(GatewayError):
    """A field is not base64."""


class NotAnImage(GatewayError):
    """The content is no image of a known format."""


class DamagedImage(GatewayError):
    """An image is truncated or contradicts itself."""


class AnimatedImage(GatewayError):
    """An image has several frames."""


class ImageTooSmall(GatewayError):
    """An image is too small to be inferred at its own size."""


class SizesDiffer(GatewayError):
    """The two images differ in size."""


class ClientGone(GatewayError):
    """The client closed the connection; nobody reads this answer."""


class InternalError(GatewayError):
    """A bug of the gateway."""


class ModelFailed(GatewayError):
    """The model failed, or answered something that is no flow."""


class Overloaded(GatewayError):
    """The gateway has as many requests, or bytes, as it may have."""


class QueueFull(GatewayError):
    """Triton's queue for the model is full."""


class InferenceUnavailable(GatewayError):
    """No Triton serves the model at the moment."""


class Stopping(GatewayError):
    """The gateway is shutting down."""


class DeadlineExceeded(GatewayError):
    """The flow was not ready before the deadline."""


@dataclass(frozen=True)
class Kind:
    """What clients are told about one cause."""

    status: int
    slug: str
    title: str

    @property
    def type(self) -> str:
        """The problem's `type`, which never changes."""
        return f"urn:problem-type:flownet2:{self.slug}"


KINDS: dict[type[GatewayError], Kind] = {
    BadRequest: Kind(400, "bad-request", "The request is not HTTP"),
    BadJson: Kind(400, "bad-json", "The body is not a JSON object"),
    BadMultipart: Kind(400, "bad-multipart", "The body is not a multipart form"),
    Unauthorized: Kind(401, "unauthorized", "An API key is needed"),
    NotFound: Kind(404, "not-found", "There is nothing at this path"),
    UnknownModel: Kind(404, "unknown-model", "There is no such model"),
    MethodNotAllowed: Kind(405, "method-not-allowed", "The path does not take this method"),
    NotAcceptable: Kind(406, "not-acceptable", "No acceptable format"),
    BodyTimeout: Kind(408, "body-timeout", "The body arrived too slowly"),
    BodyTooLarge: Kind(413, "body-too-large", "The body is too long"),
    ImageTooLarge: Kind(413, "image-too-large", "An image has too many pixels"),
    UnsupportedMediaType: Kind(415, "unsupported-media-type", "Unsupported type of body"),
    UnsupportedImageFormat: Kind(415, "unsupported-image-format", "Unsupported image format"),
    InvalidParameter: Kind(422, "invalid-parameter", "Invalid parameter"),
    MissingField: Kind(422, "missing-field", "A field is missing"),
    UnexpectedField: Kind(422, "unexpected-field", "A field is unknown"),
    WrongType: Kind(422, "wrong-type", "A field is not a string"),
    BadBase64: Kind(422, "bad-base64", "A field is not base64"),
    NotAnImage: Kind(422, "not-an-image", "A field holds no image"),
    DamagedImage: Kind(422, "damaged-image", "An image is damaged"),
    AnimatedImage: Kind(422, "animated-image", "An image is animated"),
    ImageTooSmall: Kind(422, "image-too-small", "An image is too small"),
    SizesDiffer: Kind(422, "sizes-differ", "The images differ in size"),
    ClientGone: Kind(499, "client-gone", "The client closed the connection"),
    InternalError: Kind(500, "internal-error", "The gateway failed"),
    ModelFailed: Kind(502, "model-failed", "The model failed"),
    Overloaded: Kind(503, "overloaded", "The service is overloaded"),
    QueueFull: Kind(503, "queue-full", "The model's queue is full"),
    InferenceUnavailable: Kind(503, "inference-unavailable", "The model is not served now"),
    Stopping: Kind(503, "stopping", "The service is shutting down"),
    DeadlineExceeded: Kind(504, "deadline-exceeded", "The deadline has passed"),
}


def problem(error: GatewayError, request_id: str, retry_after_s: int) -> Response:
    """The answer to a request that failed: `application/problem+json`."""
    kind = KINDS[type(error)]
    content = {
        "type": kind.type,
        "title": kind.title,
        "status": kind.status,
        "detail": error.detail,
        **({"field": error.field} if error.field else {}),
        "request_id": request_id,
    }
    headers = dict(error.headers)
    if kind.status == HTTPStatus.SERVICE_UNAVAILABLE:
        headers["Retry-After"] = str(retry_after_s)
    return Response(orjson.dumps(content), kind.status, headers, MEDIA_TYPE)

"""From the body of a request to the bytes of two image files."""

import asyncio

import msgspec
import pybase64
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import Field, File, FormParser, parse_options_header
from starlette.requests import Request

from gateway.admission import Reservation
from gateway.errors import (
    BadBase64,
    BadJson,
    BadMultipart,
    BodyTimeout,
    BodyTooLarge,
    MissingField,
    UnexpectedField,
    UnsupportedMediaType,
    WrongType,
)

MULTIPART = "multipart/form-data"
JSON_FIELDS = ("image1_base64", "image2_base64")
FORM_FIELDS = ("image1", "image2")

# What clients of a JSON service send without a thought: `curl -d` announces a web form, and some
# libraries nothing at all. The service that this one replaces read JSON under any of them.
READ_AS_JSON = {
    "",
    "application/json",
    "text/plain",
    "text/json",
    "application/octet-stream",
    "application/x-www-form-urlencoded",
}

IDLE_SECONDS = 10.0
"""A body of which nothing comes for so long is given up, and what was kept free for it."""

_URL_SAFE = bytes.maketrans(b"-_", b"+/")
_SHOWN_LENGTH = 40


class _JsonBody(msgspec.Struct, forbid_unknown_fields=True):
    """The JSON body. Its values stay what they are in it, bytes: however many objects a hostile
    one describes, none of them is made."""

    image1_base64: msgspec.Raw = msgspec.Raw()
    image2_base64: msgspec.Raw = msgspec.Raw()


_JSON_DECODER = msgspec.json.Decoder(_JsonBody)


async def read(request: Request, limit: int, reservation: Reservation) -> bytearray:
    """Read the body, at most `limit` bytes, whatever its header says.

    Raises:
        UnsupportedMediaType: the header announces something that cannot be read.
        BodyTooLarge: the body is longer than the limit.
        BodyTimeout: nothing of it comes any more.
        Overloaded: all bodies together are longer than the budget.
    """
    check_headers(request)
    announced = request.headers.get("content-length", "0")
    size = (
        int(announced) if announced.isdecimal() and len(announced) < len(str(2**63)) else limit + 1
    )
    _check_length(size, limit)
    reservation.grow(size)
    body = bytearray()
    stream = request.stream()
    while True:
        try:
            async with asyncio.timeout(IDLE_SECONDS):
                chunk = await anext(stream, None)
        except TimeoutError:
            raise BodyTimeout(
                f"Nothing of the body came for {IDLE_SECONDS:g} seconds.",
                headers={"Connection": "close"},
            ) from None
        if chunk is None:
            return body
        _check_length(len(body) + len(chunk), limit)
        reservation.grow(len(body) + len(chunk))
        body += chunk


def _check_length(size: int, limit: int) -> None:
    if size > limit:
        raise BodyTooLarge(f"The body is longer than {limit} bytes. Send smaller images.")


def check_headers(request: Request) -> None:
    """Refuse a body that cannot be read before any of it is.

    Raises:
        UnsupportedMediaType: neither JSON nor a multipart form, or compressed.
    """
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("", "identity"):
        raise UnsupportedMediaType(
            "The body is compressed. Send it as it is; images are compressed already.",
            field="Content-Encoding",
            headers={"Accept-Encoding": "identity"},
        )
    kind = _media_type(request.headers.get("content-type", ""))
    if kind != MULTIPART and kind not in READ_AS_JSON and not kind.endswith("+json"):
        raise UnsupportedMediaType(
            "Send JSON (application/json) or two files (multipart/form-data).",
            field="Content-Type",
            headers={"Accept-Post": f"application/json, {MULTIPART}"},
        )


def _media_type(content_type: str) -> str:
    return content_type.partition(";")[0].strip().lower()


def parse(body: bytearray, content_type: str) -> dict[str, bytes]:
    """The two image files in a body: field name -> bytes, first image first.

    Raises:
        BadJson, BadMultipart, MissingField, UnexpectedField, WrongType, BadBase64.
    """
    if _media_type(content_type) == MULTIPART:
        return _parse_form(body, content_type)
    return _parse_json(body)


def _parse_json(body: bytearray) -> dict[str, bytes]:
    try:
        fields = _JSON_DECODER.decode(body)
    except msgspec.ValidationError as error:
        _, unknown, name = str(error).partition("unknown field `")
        if unknown:
            raise _unexpected(name.rstrip("`"), JSON_FIELDS) from None
        raise BadJson(f"The body must be a JSON object with {' and '.join(JSON_FIELDS)}.") from None
    except (msgspec.DecodeError, RecursionError) as error:
        raise BadJson(f"The body is not JSON: {error}.") from None
    strings = {name: memoryview(getattr(fields, name)) for name in JSON_FIELDS}
    for name, value in strings.items():
        if not value:
            raise MissingField(f"{name} is missing.", field=name)
        if value[0] != ord('"'):
            raise WrongType(f"{name} must be a string with a base64 encoded image.", field=name)
    return {name: _decode_base64(value, name) for name, value in strings.items()}


def _unexpected(name: str, expected: tuple[str, str]) -> UnexpectedField:
    shown = name[:_SHOWN_LENGTH]
    return UnexpectedField(
        f"The fields are {' and '.join(expected)}; leave out {shown!r}.", field=shown
    )


def _decode_base64(string: memoryview, field: str) -> bytes:
    """Decode base64, plain or URL-safe, wrapped, without padding, or with a data URL's prefix.

    Args:
        string: a string in JSON, quotes and escapes included.
        field: the field that holds it.

    Raises:
        BadBase64: something else is in the string, or it is cut off, or it is empty.
    """
    try:
        try:
            data = pybase64.b64decode(string[1:-1], validate=True)  # as nearly all clients send it
        except ValueError:
            data = pybase64.b64decode(_canonical(bytes(string)), validate=True)
    except (ValueError, msgspec.DecodeError):
        raise BadBase64(f"{field} is not base64, or it is cut off.", field=field) from None
    if not data:
        raise BadBase64(f"{field} is empty.", field=field)
    return data


def _canonical(text: bytes) -> bytes:
    """The base64 of a string in JSON: no escapes, prefix or line ends, but padding.

    Raises:
        ValueError: it has characters beyond Latin-1, one of which would make Python keep the whole
            string in four bytes a character.
    """
    if b"\\" in text:
        if not text.isascii() or text.count(b"\\u") != text.count(b"\\u00"):
            raise ValueError
        text = msgspec.json.decode(text, type=str).encode("ascii")
    else:
        text = text[1:-1]
    if text[:5].lower() == b"data:":
        text = text.partition(b",")[2]
    text = text.translate(_URL_SAFE, delete=b" \t\r\n").rstrip(b"=")
    return text + b"=" * (-len(text) % 4)


def _parse_form(body: bytearray, content_type: str) -> dict[str, bytes]:
    boundary = parse_options_header(content_type)[1].get(b"boundary")
    if not boundary:
        raise BadMultipart("The Content-Type header has no boundary.", field="Content-Type")
    parts: dict[str, bytes] = {}

    def add(name: bytes | None, value: bytes) -> None:
        key = (name or b"").decode("utf-8", "replace")
        if key not in FORM_FIELDS:
            raise _unexpected(key, FORM_FIELDS)
        if key in parts:
            raise UnexpectedField(f"{key} is there twice.", field=key)
        parts[key] = value

    def on_field(field: Field) -> None:
        add(field.field_name, field.value or b"")

    def on_file(file: File) -> None:
        add(file.field_name, file.file_object.getvalue())  # type: ignore[union-attr]

    try:
        parser = FormParser(
            MULTIPART,
            on_field,
            on_file,
            boundary=boundary,
            config={"MAX_MEMORY_FILE_SIZE": None, "MAX_FIELDS": len(FORM_FIELDS)},
        )
        parser.write(body)  # type: ignore[arg-type]
        parser.finalize()
    except FormParserError as error:
        raise BadMultipart(f"The multipart form cannot be read: {str(error)[:120]}.") from None
    for name in FORM_FIELDS:
        if name not in parts:
            raise MissingField(f"{name} is missing.", field=name)
    return {name: parts[name] for name in FORM_FIELDS}

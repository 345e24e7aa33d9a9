"""From the body of a request to the bytes of two image files."""

import asyncio
import binascii
from typing import Any

import orjson
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

_MAX_MARKS = 100
"""Commas and opening brackets in JSON; an object with two data URLs has four. Each one more may
become an object in Python's memory, many times as large."""

_MAX_WIDE = 2**20
"""Longest JSON that is read with characters beyond Latin-1 in it, one of which makes Python keep
a whole string in four bytes a character. Its errors are told more exactly."""

_URL_SAFE = bytes.maketrans(b"-_", b"+/")
_SHOWN_NAMES = 3
_SHOWN_LENGTH = 40


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
    kind = media_type(request)
    if kind != MULTIPART and kind not in READ_AS_JSON and not kind.endswith("+json"):
        raise UnsupportedMediaType(
            "Send JSON (application/json) or two files (multipart/form-data).",
            field="Content-Type",
            headers={"Accept-Post": f"application/json, {MULTIPART}"},
        )


def media_type(request: Request) -> str:
    """The media type of the body without its parameters, in lower case."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


def parse(body: bytearray, content_type: str) -> dict[str, bytes]:
    """The two image files in a body: field name -> bytes, first image first.

    Raises:
        BadJson, BadMultipart, MissingField, UnexpectedField, WrongType, BadBase64.
    """
    if content_type.partition(";")[0].strip().lower() == MULTIPART:
        return _parse_form(body, content_type)
    return _parse_json(body)


def _parse_json(body: bytearray) -> dict[str, bytes]:
    if sum(body.count(mark) for mark in b",[{") > _MAX_MARKS:
        raise BadJson(
            f"The body is not JSON, or it holds more than {' and '.join(JSON_FIELDS)}. "
            "Send an object with two strings."
        )
    if len(body) > _MAX_WIDE and not _is_narrow(body):
        raise BadBase64("The body has characters that base64 does not have.")
    try:
        fields = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        if "memory" in error.msg:
            raise MemoryError from None
        raise BadJson(
            f"The body is not JSON: {error.msg} (line {error.lineno}, column {error.colno})."
        ) from None
    if not isinstance(fields, dict):
        raise BadJson(f"The body must be a JSON object with {' and '.join(JSON_FIELDS)}.")
    _check_names(fields, JSON_FIELDS)
    for name in JSON_FIELDS:
        if not isinstance(fields[name], str):
            raise WrongType(f"{name} must be a string with a base64 encoded image.", field=name)
    return {name: decode_base64(fields.pop(name), name) for name in JSON_FIELDS}


def _is_narrow(body: bytearray) -> bool:
    """Whether Python keeps the strings of a JSON document in one byte a character."""
    return body.isascii() and body.count(b"\\u") == body.count(b"\\u00")


def _check_names(fields: dict[str, Any], expected: tuple[str, str]) -> None:
    for name in expected:
        if name not in fields:
            raise MissingField(f"{name} is missing.", field=name)
    unknown = [name[:_SHOWN_LENGTH] for name in fields if name not in expected]
    if unknown:
        raise UnexpectedField(
            f"The fields are {' and '.join(expected)}; "
            f"leave out {', '.join(map(repr, unknown[:_SHOWN_NAMES]))}.",
            field=unknown[0],
        )


def decode_base64(text: str, field: str) -> bytes:
    """Decode base64, plain or URL-safe, wrapped, without padding, or with a data URL's prefix.

    Raises:
        BadBase64: something else is in the text, or it is cut off, or it is empty.
    """
    if text[:5].lower() == "data:":
        text = text.partition(",")[2]
    try:
        data = text.encode("ascii").translate(_URL_SAFE, delete=b" \t\r\n").rstrip(b"=")
        decoded = binascii.a2b_base64(data + b"=" * (-len(data) % 4), strict_mode=True)
    except (UnicodeEncodeError, binascii.Error):
        raise BadBase64(f"{field} is not base64, or it is cut off.", field=field) from None
    if not decoded:
        raise BadBase64(f"{field} is empty.", field=field)
    return decoded


def _parse_form(body: bytearray, content_type: str) -> dict[str, bytes]:
    boundary = parse_options_header(content_type)[1].get(b"boundary")
    if not boundary:
        raise BadMultipart("The Content-Type header has no boundary.", field="Content-Type")
    parts: dict[str, bytes] = {}

    def add(name: bytes | None, value: bytes) -> None:
        key = (name or b"").decode("utf-8", "replace")
        if key in parts:
            raise UnexpectedField(f"{key} is there twice.", field=key)
        parts[key] = value
        _check_names(dict.fromkeys(FORM_FIELDS) | parts, FORM_FIELDS)

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
    _check_names(parts, FORM_FIELDS)
    return {name: parts[name] for name in FORM_FIELDS}

"""Extraction of the two image files from a body, JSON or multipart form."""

import codecs
import json

import msgspec
import pybase64
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import Field, File, FormParser, parse_options_header

from gateway.errors import (
    BadBase64,
    BadJson,
    BadMultipart,
    MissingField,
    UnexpectedField,
    WrongType,
)

MULTIPART = "multipart/form-data"
JSON_FIELDS = ("image1_base64", "image2_base64")
FORM_FIELDS = ("image1", "image2")

# Types that clients send with JSON by default: `curl -d` sends that of a web form, some libraries
# none. The FlowNet2 Docker image's service reads JSON under any of them.
READ_AS_JSON = {
    "",
    "application/json",
    "text/plain",
    "text/json",
    "application/octet-stream",
    "application/x-www-form-urlencoded",
}

_URL_SAFE = bytes.maketrans(b"-_", b"+/")
_SHOWN_LENGTH = 40
_PIECE_BYTES = 2**20


class _JsonBody(msgspec.Struct, forbid_unknown_fields=True):
    """The JSON body. Its values stay undecoded bytes, so that a hostile body cannot make the
    decoder build millions of objects."""

    image1_base64: msgspec.Raw = msgspec.Raw()
    image2_base64: msgspec.Raw = msgspec.Raw()


_JSON_DECODER = msgspec.json.Decoder(_JsonBody)


def media_type(content_type: str) -> str:
    """Return the media type of a `Content-Type` header, without parameters, in lower case."""
    return content_type.partition(";")[0].strip().lower()


def parse(body: bytearray, content_type: str) -> dict[str, bytes]:
    """Return the two image files in a body by field name, the first image first.

    Raises:
        BadJson, BadMultipart, MissingField, UnexpectedField, WrongType, BadBase64.
    """
    if media_type(content_type) == MULTIPART:
        return _parse_form(body, content_type)
    return _parse_json(body)


def _parse_json(body: bytearray) -> dict[str, bytes]:
    try:
        fields = _JSON_DECODER.decode(_as_utf8(body))
    except msgspec.ValidationError as error:
        _, unknown, name = str(error).partition("unknown field `")
        if unknown:
            raise _unexpected(name.rstrip("`"), JSON_FIELDS) from None
        raise BadJson(f"The body must be a JSON object with {' and '.join(JSON_FIELDS)}.") from None
    except (msgspec.DecodeError, RecursionError, UnicodeError) as error:
        raise BadJson(f"The body is not JSON: {error}.") from None
    strings = {name: memoryview(getattr(fields, name)) for name in JSON_FIELDS}
    for name, value in strings.items():
        if not value:
            raise MissingField(f"{name} is missing.", field=name)
        if value[0] != ord('"'):
            raise WrongType(f"{name} must be a string with a base64 encoded image.", field=name)
    return {name: _decode_base64(value, name) for name, value in strings.items()}


def _as_utf8(body: bytearray) -> bytes | bytearray | memoryview:
    """Return JSON in UTF-8 without BOM. UTF-16 and UTF-32 are detected as `json.loads` does.

    Raises:
        UnicodeError: the body is not in the encoding that its first bytes announce.
    """
    encoding = json.detect_encoding(bytes(body[:4]))
    if encoding == "utf-8":
        return body
    if encoding == "utf-8-sig":
        return memoryview(body)[len(codecs.BOM_UTF8) :]
    # In pieces: a single wide character would make Python keep all of a string in four bytes each.
    decoder = codecs.getincrementaldecoder(encoding)()
    pieces = (body[start : start + _PIECE_BYTES] for start in range(0, len(body), _PIECE_BYTES))
    converted = b"".join(decoder.decode(piece).encode() for piece in pieces)
    decoder.decode(b"", final=True)
    return converted


def _unexpected(name: str, expected: tuple[str, str]) -> UnexpectedField:
    shown = name[:_SHOWN_LENGTH]
    return UnexpectedField(
        f"The fields are {' and '.join(expected)}; remove {shown!r}.", field=shown
    )


def _decode_base64(string: memoryview, field: str) -> bytes:
    """Decode base64: plain or URL-safe, with line ends, without padding, or as a data URL.

    Args:
        string: a JSON string with its quotes and escapes.
        field: name of the field, for messages.

    Raises:
        BadBase64: the string is empty, incomplete, or not base64.
    """
    try:
        try:
            data = pybase64.b64decode(string[1:-1], validate=True)  # as nearly all clients send it
        except ValueError:
            data = pybase64.b64decode(_canonical(bytes(string)), validate=True)
    except (ValueError, msgspec.DecodeError):
        hint = ""
        if bytes(string[1:3]) in (b"b'", b"b\\"):
            hint = (
                " It starts with b' like a printed Python bytes object: send "
                "base64.b64encode(file).decode(), or remove the b and the quotes."
            )
        raise BadBase64(f"{field} is not base64, or it is incomplete.{hint}", field=field) from None
    if not data:
        raise BadBase64(f"{field} is empty.", field=field)
    return data


def _canonical(text: bytes) -> bytes:
    """Return the base64 in a JSON string without escapes, prefix and line ends, but with padding.

    Raises:
        ValueError: the string has characters beyond Latin-1, a single one of which would make
            Python keep the whole string in four bytes a character.
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
            raise UnexpectedField(f"{key} occurs twice.", field=key)
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

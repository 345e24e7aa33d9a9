"""Image files out of JSON and forms: variants of base64, and hostile bodies."""

import base64
import contextlib
import json
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway import fields
from gateway.errors import (
    BadBase64,
    BadJson,
    BadMultipart,
    GatewayError,
    MissingField,
    UnexpectedField,
    WrongType,
)

WITH_SECOND = b'", "image2_base64": "YQ=="}'
FORM = "multipart/form-data; boundary=xyz"


@given(
    st.binary(min_size=1, max_size=200), st.booleans(), st.booleans(), st.booleans(), st.booleans()
)
def test_base64_dialects(
    data: bytes, url_safe: bool, padded: bool, wrapped: bool, prefixed: bool
) -> None:
    text = (base64.urlsafe_b64encode if url_safe else base64.b64encode)(data).decode()
    text = text if padded else text.rstrip("=")
    text = (
        "\r\n".join(text[i : i + 76] for i in range(0, len(text), 76)) + "\n" if wrapped else text
    )
    text = f"data:image/png;base64,{text}" if prefixed else text
    assert decode(text) == data


def decode(text: str) -> bytes:
    """The first image of a JSON body whose second one is valid."""
    content = json.dumps({"image1_base64": text, "image2_base64": "YQ=="}).encode()
    return fields.parse(bytearray(content), "application/json")["image1_base64"]


@pytest.mark.parametrize(
    "text",
    ["", "   ", "=", "abcde", "ab!d", "ab=d", "ab==cd", "žlutý", "\u2028", "data:x", "data:,"],
)
def test_broken_base64(text: str) -> None:
    with pytest.raises(BadBase64, match="image1_base64") as caught:
        decode(text)
    assert caught.value.field == "image1_base64"


@given(st.text(max_size=60))
def test_any_text_is_decoded_or_refused(text: str) -> None:
    with contextlib.suppress(BadBase64):
        assert decode(text)


@pytest.mark.parametrize(
    ("content", "error", "field"),
    [
        (b"", BadJson, None),
        (b"not json", BadJson, None),
        (b"[1, 2]", BadJson, None),
        (b'"text"', BadJson, None),
        (b"\xff\xfe{\x00}", BadJson, None),  # half a character of UTF-16
        (b"image1_base64=abc&image2_base64=def", BadJson, None),
        (b'{"image1_base64": ' + b"1" * 5000 + b"}", WrongType, "image1_base64"),
        (b'{"image1_base64": ' + b"[" * 100_000, BadJson, None),
        (b'{"image1_base64": "\\ud800", "image2_base64": ""}', BadJson, None),
        (b'{"image1_base64": NaN}', BadJson, None),
        (b"{}", MissingField, "image1_base64"),
        (b'{"image1_base64": "YQ=="}', MissingField, "image2_base64"),
        (b'{"image1_base64": 1, "image2_base64": "YQ=="}', WrongType, "image1_base64"),
        (b'{"image1_base64": "YQ==", "image2_base64": null}', WrongType, "image2_base64"),
        # Values without end, each of which would become an object.
        (b'{"image1_base64": [[]' + b",[]" * 1000 + b"]}", WrongType, "image1_base64"),
        (b'{"image1_base64": ' + b'{"":' * 200 + b"0" + b"}" * 201, WrongType, "image1_base64"),
        (b'{"image1_base64": "YQ==", "image2_base64": ["YQ=="]}', WrongType, "image2_base64"),
        (
            b'{"image1_base64": "YQ==", "image2_base64": "YQ==", "image3": 0}',
            UnexpectedField,
            "image3",
        ),
        (b'{"image1_base64": "YQ==", "image2_base64": "%"}', BadBase64, "image2_base64"),
        (b'{"image1_base64": "YQ==", "image2_base64": "\xc5\xbe"}', BadBase64, "image2_base64"),
        # One wide character makes a string four times as long in memory.
        (
            b'{"image1_base64": "\xf0\x9f\x98\x80' + b"A" * 2**20 + WITH_SECOND,
            BadBase64,
            "image1_base64",
        ),
        (
            b'{"image1_base64": "\\ud83d\\ude00' + b"A" * 2**20 + WITH_SECOND,
            BadBase64,
            "image1_base64",
        ),
        (b'{"image1_base64": "\\u002b' + b"A" * 2**20 + b'"}', MissingField, "image2_base64"),
    ],
)
def test_broken_json(content: bytes, error: type[GatewayError], field: str | None) -> None:
    with pytest.raises(error) as caught:
        fields.parse(bytearray(content), "application/json")
    assert caught.value.field == field
    assert error.status in (400, 422)
    assert len(caught.value.detail) < 300


def test_a_long_unknown_name_is_not_repeated() -> None:
    content = b'{"image1_base64": "", "image2_base64": "", "' + b"x" * 10**6 + b'": 1}'
    with pytest.raises(UnexpectedField) as caught:
        fields.parse(bytearray(content), "")
    assert len(caught.value.detail) < 300
    assert len(caught.value.field or "") < 100


def form(*parts: tuple[str, bytes], end: bytes = b"--xyz--\r\n") -> bytearray:
    content = bytearray()
    for disposition, value in parts:
        content += b"--xyz\r\nContent-Disposition: form-data; " + disposition.encode() + b"\r\n\r\n"
        content += value + b"\r\n"
    return content + end


FIRST = ('name="image1"; filename="a.png"', b"\x89PNG\r\n\x1a\n\0first")
SECOND = ('name="image2"; filename="b.png"', b"\r\n--xy\r\nsecond")


def test_form_with_two_files() -> None:
    parsed = fields.parse(form(SECOND, FIRST), FORM)
    assert list(parsed.items()) == [("image1", FIRST[1]), ("image2", SECOND[1])]


@pytest.mark.parametrize(
    ("content", "content_type", "error"),
    [
        (form(FIRST), FORM, MissingField),
        (form(FIRST, SECOND, ('name="image3"', b"x")), FORM, UnexpectedField),
        (form(FIRST, FIRST, SECOND), FORM, UnexpectedField),
        (form(('name="image1_base64"', b"YQ=="), SECOND), FORM, UnexpectedField),
        (form(("nothing", b"x")), FORM, BadMultipart),
        (form(FIRST, SECOND), "multipart/form-data", BadMultipart),
        (form(FIRST, SECOND), "multipart/form-data; boundary=" + "x" * 1000, BadMultipart),
        (bytearray(b"no boundary"), FORM, BadMultipart),
        (bytearray(), FORM, MissingField),
        (form(FIRST, SECOND, end=b""), FORM, MissingField),
        (bytearray(b"--xyz\r\n" + b"h" * 10**7), FORM, BadMultipart),
        (bytearray(b"--xyz\r\n" + b"a: b\r\n" * 10**6), FORM, BadMultipart),
        (bytearray(b"--xyz\r\n\r\n" * 10**6), FORM, GatewayError),
        (form(*[('name="image1"', b"")] * 10**5), FORM, UnexpectedField),
    ],
)
def test_broken_forms(content: bytearray, content_type: str, error: type[GatewayError]) -> None:
    with pytest.raises(error) as caught:
        fields.parse(content, content_type)
    assert caught.value.status in (400, 422)


@pytest.mark.parametrize(
    "encoding",
    [
        "utf-8",
        "utf-8-sig",
        *(f"utf-{bits}{order}" for bits in (16, 32) for order in ("", "-le", "-be")),
    ],
)
def test_json_is_read_as_json_loads_does(encoding: str) -> None:
    text = json.dumps({"image1_base64": "YWFh" * 10**6, "image2_base64": "YmJi"})
    parsed = fields.parse(bytearray(text.encode(encoding)), "application/json")
    assert parsed == {"image1_base64": b"aaa" * 10**6, "image2_base64": b"bbb"}


def test_wide_characters_do_not_multiply_the_memory() -> None:
    """One character beyond the BMP would make Python keep each of the others in four bytes."""
    text = '{"image1_base64": "' + "A" * 2**23 + '", "\N{GRINNING FACE}": 1}'
    content = bytearray(text.encode("utf-16"))
    tracemalloc.start()
    try:
        with pytest.raises(UnexpectedField):
            fields.parse(content, "")
        assert tracemalloc.get_traced_memory()[1] < 3 * 2**23
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("text", [r"b'YQ=='", r"b\"YQ==\"", r"b'YQ==\n'"])
def test_base64_printed_as_python_bytes_gets_a_hint(text: str) -> None:
    content = json.dumps({"image1_base64": text, "image2_base64": "YQ=="}).encode()
    with pytest.raises(BadBase64, match="decode") as caught:
        fields.parse(bytearray(content), "")
    assert "b'" in caught.value.detail
    assert caught.value.field == "image1_base64"


@pytest.mark.parametrize("filler", [b"\r\n--xy", b"\r\n--xyq", b"\r", b"-", b"\r\n\r\n"])
def test_lookalikes_of_the_boundary_are_content(filler: bytes) -> None:
    value = filler * (2**20 // len(filler))
    parsed = fields.parse(form(("name=image1; filename=a", value), SECOND), FORM)
    assert parsed["image1"] == value


@given(
    st.binary(max_size=300),
    st.sampled_from(["application/json", FORM, "", 'multipart/form-data; boundary=""']),
)
def test_any_body_is_the_clients_error(content: bytes, content_type: str) -> None:
    with pytest.raises(GatewayError) as caught:
        fields.parse(bytearray(content), content_type)
    assert caught.value.status in (400, 422)

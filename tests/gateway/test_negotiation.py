"""Accept and Accept-Encoding, as RFC 9110 has them."""

import gzip

import numpy as np
import pytest
import zstandard

from gateway.encoders import ENCODINGS, FORMATS, Estimate
from gateway.errors import NotAcceptable
from gateway.negotiation import choose_encoding, choose_format


@pytest.mark.parametrize(
    ("accept", "chosen"),
    [
        ("", "application/json"),
        ("*/*", "application/json"),
        ("application/*", "application/json"),
        ("Application/X-NPY", "application/x-npy"),
        ("image/*", "image/png"),
        ("image/x-kitti-flow, image/*;q=0.5", "image/x-kitti-flow"),
        # <img> in Chromium, Firefox and Safari, and a page's address in Chromium.
        ("image/avif,image/webp,image/apng,image/svg+xml,image/*,*/*;q=0.8", "image/png"),
        ("image/avif,image/webp,image/png,image/svg+xml,image/*;q=0.8,*/*;q=0.5", "image/png"),
        ("image/webp,image/avif,image/jxl,video/*;q=0.8,image/png,image/*;q=0.8", "image/png"),
        ("text/html,application/xml;q=0.9,image/avif,image/webp,*/*;q=0.8", "application/json"),
        ("image/png", "image/png"),
        ("text/html, image/png;q=0.5, */*;q=0.1", "image/png"),
        ("application/json;q=0.5, application/x-flo", "application/x-flo"),
        ("*/*, application/json;q=0", "application/x-npy"),
        ("application/json; charset=utf-8", "application/json"),
        ("application/x-flo;q=oops, application/json;q=0.1", "application/json"),
        ("application/json;q=nan, image/png;q=0.5", "image/png"),
        ("application/json;q=0.5, image/png;q=inf", "application/json"),
    ],
)
def test_format(accept: str, chosen: str) -> None:
    assert choose_format(accept, both_directions=False).media_type == chosen


@pytest.mark.parametrize(
    "accept",
    ["text/html", "application/json;q=0", "*/*;q=0", "*/*;q=nan", "*/*;q=2", ";;,,", "q=1"],
)
def test_no_format(accept: str) -> None:
    with pytest.raises(NotAcceptable, match="application/json"):
        choose_format(accept, both_directions=False)


@pytest.mark.parametrize(
    ("accept", "chosen"),
    [
        ("", "application/json"),
        ("application/x-npz", "application/x-npz"),
        ("application/x-npy, */*;q=0.1", "application/json"),
        ("application/x-npy", None),
        ("image/*", None),
    ],
)
def test_format_of_both_directions(accept: str, chosen: str | None) -> None:
    if chosen:
        assert choose_format(accept, both_directions=True).media_type == chosen
    else:
        with pytest.raises(NotAcceptable, match="application/json, application/x-npz"):
            choose_format(accept, both_directions=True)


@pytest.mark.parametrize(
    ("accept", "chosen"),
    [
        ("", None),
        ("identity", None),
        ("br", None),
        ("gzip, deflate, br, zstd", "zstd"),
        ("gzip, deflate", "gzip"),
        ("gzip;q=1, zstd;q=0.5", "gzip"),
        ("gzip;q=0, zstd;q=0", None),
        ("identity, gzip;q=0.5", None),
        ("identity;q=0.5, gzip", "gzip"),
        ("identity, gzip", "gzip"),
        ("*", "zstd"),
        ("*;q=0.1, gzip;q=0.5", "gzip"),
        ("zstd;q=0, *", "gzip"),
        ("*;q=0", None),
        ("gzip;q=nan", None),
        ("zstd;q=nan, gzip;q=0.5", "gzip"),
    ],
)
def test_encoding(accept: str, chosen: str | None) -> None:
    assert choose_encoding(accept) == chosen


def test_encodings_are_what_their_names_say() -> None:
    data = b"0.123,-4.5," * 10_000
    assert gzip.decompress(ENCODINGS["gzip"](data)) == data
    assert zstandard.decompress(ENCODINGS["zstd"](data)) == data
    assert all(len(encode(data)) < len(data) / 4 for encode in ENCODINGS.values())


def test_kittis_png_is_not_acceptable_for_vectors_that_it_cannot_hold() -> None:
    flow = np.zeros((4, 5, 2), np.float32)
    flow[0, 0] = (513, 0)
    encode = FORMATS["image/x-kitti-flow"].encode
    with pytest.raises(NotAcceptable, match="1 of 20 vectors"):
        encode(Estimate(flow, (1.0, 1.0)))

"""Reading of bodies: limits on size and time, and compressed bodies."""

import asyncio
import gzip
import random
import zlib
from collections.abc import Callable

import pytest
import zstandard
from starlette.requests import Request

from gateway import body
from gateway.admission import Budget, Reservation
from gateway.errors import (
    BadEncoding,
    BodyTimeout,
    BodyTooLarge,
    Overloaded,
    UnsupportedMediaType,
)

LIMIT = 2**20
TEXT = random.Random(0).randbytes(20_000).hex().encode()


def raw_deflate(data: bytes) -> bytes:
    """Deflate without zlib's head, as .NET sends it."""
    compressor = zlib.compressobj(wbits=-15)
    return compressor.compress(data) + compressor.flush()


def read(
    content: bytes, coding: str | None = None, chunk: int = 2**16, budget: Budget | None = None
) -> bytes:
    """Return the body that arrives in chunks, and check that its budget is released."""

    async def run() -> bytes:
        pieces = [content[start : start + chunk] for start in range(0, len(content), chunk)]
        messages = [{"type": "http.request", "body": piece, "more_body": True} for piece in pieces]
        messages.append({"type": "http.request", "body": b"", "more_body": False})
        received = iter(messages)

        async def receive() -> dict[str, object]:
            return next(received)

        headers = [(b"content-encoding", coding.encode())] if coding else []
        request = Request({"type": "http", "method": "POST", "headers": headers}, receive)
        available = budget or Budget(8 * LIMIT)
        with Reservation(available) as reservation:
            whole = bytes(await body.read(request, LIMIT, reservation))
            assert reservation.amount >= len(whole)
        assert available.free == available.size
        return whole

    return asyncio.run(run())


CODINGS: dict[str, tuple[str, Callable[[bytes], bytes]]] = {
    "gzip": ("gzip", gzip.compress),
    "x-gzip": ("X-GZip", gzip.compress),
    "two members": ("gzip", lambda data: gzip.compress(data[:99]) + gzip.compress(data[99:])),
    "deflate": ("deflate", zlib.compress),
    "raw deflate": ("deflate", raw_deflate),
    "zstd": ("zstd", zstandard.compress),
    "two frames": ("zstd", lambda x: zstandard.compress(x[:99]) + zstandard.compress(x[99:])),
    "identity": ("identity", bytes),
}


@pytest.mark.parametrize("chunk", [7, 2**16])
@pytest.mark.parametrize("name", CODINGS)
def test_compressed_bodies_are_read(name: str, chunk: int) -> None:
    coding, compress = CODINGS[name]
    assert read(compress(TEXT), coding, chunk) == TEXT


@pytest.mark.parametrize("name", ["gzip", "deflate", "raw deflate", "zstd"])
@pytest.mark.parametrize("kept", [0.0, 0.5, -1])
def test_truncated_streams_are_refused(name: str, kept: float) -> None:
    """Half of one, one without its last byte, and none at all."""
    coding, compress = CODINGS[name]
    whole = compress(TEXT)
    with pytest.raises(BadEncoding, match="incomplete") as caught:
        read(whole[: -1 if kept < 0 else int(kept * len(whole))], coding)
    assert (caught.value.status, caught.value.field) == (400, "Content-Encoding")


@pytest.mark.parametrize("coding", ["gzip", "deflate", "zstd"])
def test_streams_of_other_kinds_are_refused(coding: str) -> None:
    for content in (TEXT, bytes(1000), b'{"image1_base64": ""}'):
        with pytest.raises(BadEncoding):
            read(content, coding)
    damaged = bytearray(dict(CODINGS)[coding][1](TEXT))
    damaged[len(damaged) // 2] ^= 0x10
    if coding != "zstd":  # its frames have no checksum by default
        with pytest.raises(BadEncoding):
            read(bytes(damaged), coding)
    with pytest.raises(BadEncoding):
        read(dict(CODINGS)[coding][1](TEXT) + b"and more", coding)


@pytest.mark.parametrize("name", ["gzip", "deflate", "zstd"])
def test_bombs_stop_at_the_limit(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """1 GB of zeros in some 100 KB; no more than a slice of it is ever expanded."""
    coding, compress = CODINGS[name]
    produced = 0
    original = body.Expander.expand

    def expand(self: body.Expander, data: bytes) -> object:
        nonlocal produced
        for piece in original(self, data):
            produced += len(piece)
            yield piece

    monkeypatch.setattr(body.Expander, "expand", expand)
    bomb = compress(bytes(2**28))
    with pytest.raises(BodyTooLarge):
        read(bomb, coding)
    assert produced < LIMIT + 2**25


def test_expanded_bytes_count_in_the_budget() -> None:
    with pytest.raises(Overloaded):
        read(gzip.compress(bytes(2**19)), "gzip", budget=Budget(2**18))


def test_many_tiny_streams_are_refused() -> None:
    with pytest.raises(BadEncoding, match="streams"):
        read(gzip.compress(b"") * 5000, "gzip")


def test_zstd_with_a_huge_window_is_refused() -> None:
    parameters = zstandard.ZstdCompressionParameters(window_log=27)
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    with pytest.raises(BadEncoding):
        read(compressor.compress(TEXT) + compressor.flush(), "zstd")


@pytest.mark.parametrize("coding", ["br", "gzip, gzip", "deflate, gzip", "nonsense", "compress"])
def test_unknown_and_several_codings_are_refused(coding: str) -> None:
    with pytest.raises(UnsupportedMediaType) as caught:
        read(b"", coding)
    assert caught.value.headers == {"Accept-Encoding": "gzip, deflate, zstd"}


def test_a_body_that_stalls_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    async def read() -> None:
        messages = iter([{"type": "http.request", "body": b"{", "more_body": True}])

        async def receive() -> dict[str, object]:
            for message in messages:
                return message
            return await asyncio.get_running_loop().create_future()

        headers = [(b"content-length", b"1000")]
        request = Request({"type": "http", "method": "POST", "headers": headers}, receive)
        budget = Budget(10_000)
        with Reservation(budget) as reservation, pytest.raises(BodyTimeout) as caught:
            await body.read(request, 10_000, reservation)
        assert caught.value.headers == {"Connection": "close"}
        assert budget.free == budget.size

    monkeypatch.setattr(body, "IDLE_SECONDS", 0.05)
    asyncio.run(asyncio.wait_for(read(), 20))

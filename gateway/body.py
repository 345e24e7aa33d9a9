"""Reading of request bodies: limits on size and time, and content codings."""

import asyncio
import zlib
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Protocol

import zstandard
from isal import isal_zlib
from starlette.requests import Request

from gateway.admission import Reservation
from gateway.errors import BadEncoding, BodyTimeout, BodyTooLarge, UnsupportedMediaType
from gateway.fields import MULTIPART, READ_AS_JSON, media_type

IDLE_SECONDS = 10.0
"""A body of which nothing arrives for this long gets a 408."""

ZSTD_WINDOW_BYTES = 8 * 2**20
"""Largest window of a zstd body, as RFC 8878 recommends."""

MAX_STREAMS = 1000
"""Gzip members or zstd frames in a body; each needs a decompressor of its own."""

_YIELD_BYTES = 2**18
"""After a piece of this size the event loop gets a turn."""


class Decompressor(Protocol):
    """Interface that zlib, isal and zstandard share."""

    @property
    def eof(self) -> bool:
        """True after the end of the compressed stream."""

    @property
    def unused_data(self) -> bytes:
        """Bytes after the end of the stream."""

    def decompress(self, data: bytes) -> bytes:
        """Return the bytes that the data decompresses to."""


def _gzip(_: bytes) -> Decompressor:
    return isal_zlib.decompressobj(wbits=zlib.MAX_WBITS + 16)


def _deflate(start: bytes) -> Decompressor:
    """Return a decompressor for the zlib format, or for raw deflate, which some clients send."""
    is_zlib = start[0] & 0x0F == zlib.DEFLATED
    return isal_zlib.decompressobj(wbits=zlib.MAX_WBITS if is_zlib else -zlib.MAX_WBITS)


def _zstd(_: bytes) -> Decompressor:
    return zstandard.ZstdDecompressor(max_window_size=ZSTD_WINDOW_BYTES).decompressobj()


# Content coding -> decompressor for a stream that starts with these bytes, and how many bytes it is
# given at a time. A slice expands to at most about 16 MB: deflate expands up to 1032 times, and
# zstd makes 128 KiB of 4 bytes.
_CODINGS: dict[str, tuple[Callable[[bytes], Decompressor], int]] = {
    "gzip": (_gzip, 2**14),
    "deflate": (_deflate, 2**14),
    "zstd": (_zstd, 2**9),
}


async def read(request: Request, limit: int, reservation: Reservation) -> bytearray:
    """Read and decompress the body.

    Args:
        request: the request; `check_headers` has accepted it.
        limit: largest number of bytes of the body, as sent and decompressed.
        reservation: grows with the body.

    Raises:
        BodyTooLarge: the body is larger than the limit.
        BodyTimeout: no more of it arrives.
        BadEncoding: the compressed body is damaged.
        Overloaded: all bodies together exceed their budget.
    """
    announced = request.headers.get("content-length", "0")
    sent = int(announced) if announced.isdecimal() and len(announced) < 20 else limit + 1
    _check_size(sent, limit)
    reservation.grow(sent)
    body = bytearray()
    async for piece in _decompressed(_received(request, limit), content_coding(request)):
        _check_size(len(body) + len(piece), limit)
        reservation.grow(len(body) + len(piece))
        body += piece
        if len(piece) > _YIELD_BYTES:
            await asyncio.sleep(0)
    return body


async def _received(request: Request, limit: int) -> AsyncIterator[bytes]:
    """Iterate over the body's pieces as they arrive."""
    stream = request.stream()
    size = 0
    while True:
        try:
            async with asyncio.timeout(IDLE_SECONDS):
                chunk = await anext(stream, None)
        except TimeoutError:
            raise BodyTimeout(
                f"No data of the body arrived for {IDLE_SECONDS:g} seconds.",
                headers={"Connection": "close"},
            ) from None
        if chunk is None:
            return
        size += len(chunk)
        _check_size(size, limit)
        yield chunk


async def _decompressed(chunks: AsyncIterator[bytes], coding: str | None) -> AsyncIterator[bytes]:
    """Iterate over the decompressed pieces of a body."""
    if coding is None:
        async for chunk in chunks:
            yield chunk
        return
    expander = Expander(coding)
    async for chunk in chunks:
        for piece in expander.expand(chunk):
            yield piece
    expander.finish()


class Expander:
    """Decompression in slices, of one compressed stream or several in succession."""

    def __init__(self, coding: str) -> None:
        self._coding = coding
        self._new, self._slice = _CODINGS[coding]
        self._stream: Decompressor | None = None
        self._streams = 0

    def expand(self, data: bytes) -> Iterator[bytes]:
        """Decompress some bytes.

        Raises:
            BadEncoding: they are damaged.
        """
        for start in range(0, len(data), self._slice):
            piece = data[start : start + self._slice]
            while piece:
                if self._stream is None or self._stream.eof:
                    self._stream = self._next_stream(piece)
                try:
                    yield self._stream.decompress(piece)
                except (isal_zlib.IsalError, zstandard.ZstdError) as error:  # type: ignore[misc]
                    raise self._damaged(str(error)) from None
                piece = self._stream.unused_data if self._stream.eof else b""

    def _next_stream(self, start: bytes) -> Decompressor:
        self._streams += 1
        if self._streams > MAX_STREAMS:
            raise self._damaged(f"it has more than {MAX_STREAMS} streams")
        return self._new(start)

    def finish(self) -> None:
        """Make sure that the last stream is complete.

        Raises:
            BadEncoding: it is not.
        """
        if self._stream is None or not self._stream.eof:
            raise self._damaged("it is incomplete")

    def _damaged(self, reason: str) -> BadEncoding:
        return BadEncoding(
            f"The body cannot be decompressed as {self._coding}: {reason}. Check how the client "
            "compresses it, or send it without Content-Encoding.",
            field="Content-Encoding",
        )


def _check_size(size: int, limit: int) -> None:
    if size > limit:
        raise BodyTooLarge(f"The body is larger than {limit} bytes. Send smaller images.")


def content_coding(request: Request) -> str | None:
    """Return the coding that the body is compressed with, or None.

    Raises:
        UnsupportedMediaType: it is unknown, or there are several.
    """
    header = ", ".join(request.headers.getlist("content-encoding")).lower()
    codings = [name.strip().removeprefix("x-") for name in header.split(",")]
    codings = [name for name in codings if name not in ("", "identity")]
    if not codings:
        return None
    if len(codings) > 1 or codings[0] not in _CODINGS:
        raise UnsupportedMediaType(
            f"Compress the body with one of {', '.join(_CODINGS)}, once, or not at all.",
            field="Content-Encoding",
            headers={"Accept-Encoding": ", ".join(_CODINGS)},
        )
    return codings[0]


def check_headers(request: Request) -> None:
    """Check the type and the coding of a body before any of it is read.

    Raises:
        UnsupportedMediaType: the type is neither JSON nor a multipart form, or the coding is
            unknown.
    """
    content_coding(request)
    kind = media_type(request.headers.get("content-type", ""))
    if kind != MULTIPART and kind not in READ_AS_JSON and not kind.endswith("+json"):
        raise UnsupportedMediaType(
            "Send JSON (application/json) or two files (multipart/form-data).",
            field="Content-Type",
            headers={"Accept-Post": f"application/json, {MULTIPART}"},
        )

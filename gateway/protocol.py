"""Uvicorn's HTTP by h11, with limits on idle connections and this service's response to bytes that
are not HTTP."""

import asyncio
import resource
import uuid
from typing import ClassVar

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from gateway.errors import BadRequest

HEAD_SECONDS = 5.0
"""A connection whose request has no complete head for so long is closed."""

MAX_CONNECTIONS = min(resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2, 4096)
"""With more, the one that has been idle longest is closed: file descriptors must be left over."""


class Protocol(H11Protocol):
    """One connection."""

    _waiting: ClassVar[dict["Protocol", asyncio.TimerHandle]] = {}
    """Idle connections, longest idle first, with the timer that closes each."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for a request."""
        super().connection_made(transport)
        self._watch_head()
        if len(self.connections) > MAX_CONNECTIONS:
            next(iter(self._waiting)).timeout_keep_alive_handler()

    def data_received(self, data: bytes) -> None:
        """Read a request, or a part of one."""
        super().data_received(data)
        self._watch_head()

    def on_response_complete(self) -> None:
        """Begin to wait for the next request."""
        super().on_response_complete()
        self._watch_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop waiting."""
        super().connection_lost(exc)
        self._stop_waiting()

    def _watch_head(self) -> None:
        if self.conn.their_state is not h11.IDLE:
            self._stop_waiting()
        elif self not in self._waiting:
            end = self.loop.call_later(HEAD_SECONDS, self.timeout_keep_alive_handler)
            self._waiting[self] = end

    def _stop_waiting(self) -> None:
        if end := self._waiting.pop(self, None):
            end.cancel()

    def send_400_response(self, msg: str) -> None:
        """Respond with a problem to bytes that are not HTTP, and close the connection."""
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):  # a response is on its way
            self.transport.close()
            return
        request_id = uuid.uuid4().hex
        error = BadRequest(
            "Send HTTP/1.1 with a Host, one length of the body, and heads of at most 64 KB.",
            headers={"Connection": "close", "X-Request-ID": request_id},
        )
        response = error.response(request_id, retry_after_s=1)
        for event in (
            h11.Response(
                status_code=response.status_code,
                reason=b"Bad Request",
                headers=response.raw_headers,
            ),
            h11.Data(data=bytes(response.body)),
            h11.EndOfMessage(),
        ):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

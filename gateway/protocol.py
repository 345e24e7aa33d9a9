"""HTTP/1.1 by uvicorn and h11, with limits on idle connections and a problem document as the
response to bytes that are not HTTP."""

import asyncio
import resource
import uuid
from typing import ClassVar

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from gateway.errors import BadRequest

HEAD_SECONDS = 5.0
"""A connection is closed if the head of a request takes longer than this: from its first byte, or
from the start of a new connection. Between requests uvicorn's `timeout_keep_alive` applies."""

MAX_CONNECTIONS = min(resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2, 4096)
"""Above this number, the connection that has been idle longest is closed, so that file descriptors
are left for other uses."""


class Protocol(H11Protocol):
    """One connection."""

    _idle: ClassVar[dict["Protocol", None]] = {}
    """Connections without a complete request head, idle longest first."""

    _head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start to wait for a request."""
        super().connection_made(transport)
        self._update_idle(head_begun=True)
        if len(self.connections) > MAX_CONNECTIONS:
            next(iter(self._idle)).timeout_keep_alive_handler()

    def data_received(self, data: bytes) -> None:
        """Read a request, or a part of one."""
        super().data_received(data)
        self._update_idle(head_begun=True)

    def on_response_complete(self) -> None:
        """Start to wait for the next request, of which a part may have arrived already."""
        super().on_response_complete()
        self._update_idle(head_begun=bool(self.conn.trailing_data[0]))

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop waiting."""
        super().connection_lost(exc)
        self._idle.pop(self, None)
        self._stop_head_timer()

    def _update_idle(self, head_begun: bool) -> None:
        """Track the connection while it is idle, and limit the time of a head that has begun."""
        if self.conn.their_state is not h11.IDLE:
            self._idle.pop(self, None)
            self._stop_head_timer()
            return
        self._idle.setdefault(self)
        if head_begun and self._head_timer is None:
            self._head_timer = self.loop.call_later(HEAD_SECONDS, self.timeout_keep_alive_handler)

    def _stop_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def send_400_response(self, msg: str) -> None:
        """Respond with a problem to bytes that are not HTTP, and close the connection."""
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):  # in the middle of a response
            self.transport.close()
            return
        request_id = uuid.uuid4().hex
        error = BadRequest(
            "Send HTTP/1.1 with a Host header, one body length, and a head of at most 64 KB.",
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

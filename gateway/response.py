"""Response that stays counted until the client has read it."""

import asyncio

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from gateway.context import context_of
from gateway.errors import ClientGone

PIECE_BYTES = 256 * 1024
GRACE_SECONDS = 30.0
BYTES_PER_SECOND = 64 * 1024
"""A client that reads more slowly than this, after the grace period, is disconnected."""


class PiecewiseResponse(Response):
    """Response that is sent piece by piece, no faster than the client reads.

    The request stays counted until the last piece is sent. A client that reads too slowly is
    disconnected.
    """

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the response."""
        start_time = asyncio.get_running_loop().time()
        head = {
            "type": "http.response.start",
            "status": self.status_code,
            "headers": self.raw_headers,
        }
        try:
            async with asyncio.timeout_at(start_time + GRACE_SECONDS):
                await send(head)
            # The empty last piece is sent after all others have been written.
            for start in (*range(0, len(self.body), PIECE_BYTES), len(self.body)):
                piece, more = self.body[start : start + PIECE_BYTES], start < len(self.body)
                async with asyncio.timeout_at(
                    start_time + GRACE_SECONDS + start / BYTES_PER_SECOND
                ):
                    await send({"type": "http.response.body", "body": piece, "more_body": more})
        except TimeoutError:  # uvicorn closes a connection whose response is incomplete
            context_of(scope).outcome = ClientGone.slug

"""A response that stays counted until its client has read it."""

import asyncio

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from gateway.context import context_of
from gateway.errors import ClientGone

PIECE_BYTES = 256 * 1024
GRACE_SECONDS = 30.0
BYTES_PER_SECOND = 64 * 1024
"""A client that reads more slowly than this, after the grace, is cut off."""


class PiecewiseResponse(Response):
    """Sends its content in pieces, each when the one before is on its way, so that what a slow
    client has not read yet stays here, and the request stays counted; but not for ever."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the response."""
        began = asyncio.get_running_loop().time()
        head = {
            "type": "http.response.start",
            "status": self.status_code,
            "headers": self.raw_headers,
        }
        try:
            async with asyncio.timeout_at(began + GRACE_SECONDS):
                await send(head)
            # The empty last piece is sent when all others are on their way.
            for start in (*range(0, len(self.body), PIECE_BYTES), len(self.body)):
                piece, more = self.body[start : start + PIECE_BYTES], start < len(self.body)
                async with asyncio.timeout_at(began + GRACE_SECONDS + start / BYTES_PER_SECOND):
                    await send({"type": "http.response.body", "body": piece, "more_body": more})
        except TimeoutError:  # the server closes a connection whose response is not complete
            context_of(scope).outcome = ClientGone.slug

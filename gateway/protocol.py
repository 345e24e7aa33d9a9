"""HTTP as uvicorn reads it with h11, with this service's response to what is no HTTP."""

import uuid

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from gateway.errors import BadRequest


class Protocol(H11Protocol):
    """One connection."""

    def send_400_response(self, msg: str) -> None:
        """Tell what bytes that are no request are, and hang up."""
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

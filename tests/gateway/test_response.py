"""Responses to clients that read slowly."""

import asyncio

import pytest

from gateway import response
from gateway.context import Context
from gateway.response import PiecewiseResponse


@pytest.mark.parametrize("stuck_at", range(4))
def test_a_client_that_does_not_read_is_disconnected(
    stuck_at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever it stops reading: at the head, in the middle, or at the end."""
    context, sent = Context("test"), []

    async def send(message: dict[str, object]) -> None:
        if len(sent) == stuck_at:
            await asyncio.get_running_loop().create_future()
        sent.append(message)

    monkeypatch.setattr(response, "GRACE_SECONDS", 0.05)
    monkeypatch.setattr(response, "BYTES_PER_SECOND", 2**30)
    sending = PiecewiseResponse(bytes(2 * response.PIECE_BYTES))(
        {"type": "http", "state": {"context": context}}, send, send
    )
    asyncio.run(asyncio.wait_for(sending, 20))
    assert len(sent) == stuck_at
    assert context.outcome == "client-gone"

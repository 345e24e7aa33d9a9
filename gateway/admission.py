"""Admission control: budgets of requests, bytes and work in flight."""

import asyncio
from typing import Self

from gateway.errors import Overloaded

SLOT_BYTES = 16 * 2**20
"""Memory of a request in flight at 512x512: images, tensors, and a flow of 5 MB as JSON."""


class Budget:
    """An amount that the requests of one event loop share."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.free = size
        self.released = asyncio.Event()
        self.turn = asyncio.Lock()


class Reservation:
    """The part of a budget that one request holds, 0 at first. A `with` block releases it."""

    def __init__(self, budget: Budget) -> None:
        self._budget = budget
        self.amount = 0

    def grow(self, amount: int) -> None:
        """Increase the reservation to this amount, if it is smaller.

        Raises:
            Overloaded: too little is left.
        """
        more = amount - self.amount
        if more <= 0:
            return
        if more > self._budget.free:
            raise Overloaded("The service is at its limit of requests or memory. Try again later.")
        self._budget.free -= more
        self.amount = amount

    async def wait(self, amount: int) -> None:
        """Wait until this amount, or the whole budget if that is less, can be reserved.

        Reservations are served in order of arrival.
        """
        amount = min(amount, self._budget.size)
        async with self._budget.turn:
            while amount > self._budget.free:
                self._budget.released.clear()
                await self._budget.released.wait()
            self.grow(amount)

    def release(self) -> None:
        """Return the reservation to the budget."""
        self._budget.free += self.amount
        self._budget.released.set()
        self.amount = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


class Limits:
    """The gateway's budgets.

    A request that exceeds `requests` or `bodies` is rejected at once. For `slots` and `responses`
    it waits; the number of requests bounds how many wait.

    Attributes:
        requests: requests admitted.
        bodies: bytes of bodies received.
        slots: work in flight, in units of `SLOT_BYTES`.
        responses: bytes of responses that clients have not read yet.
    """

    def __init__(self, max_in_flight: int, max_waiting: int, max_buffered_bytes: int) -> None:
        self.requests = Budget(max_in_flight + max_waiting)
        self.bodies = Budget(max_buffered_bytes)
        self.slots = Budget(max_in_flight)
        self.responses = Budget(max_buffered_bytes)

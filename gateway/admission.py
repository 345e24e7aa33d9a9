"""How much the gateway takes on at one time: requests, bytes and work in flight, all by budgets."""

import asyncio
from typing import Self

from gateway.errors import Overloaded

SLOT_BYTES = 16 * 2**20
"""Memory of one request in flight at 512x512: images, tensors, and a flow of 5 MB as JSON."""


class Budget:
    """An amount that requests share. For one event loop."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.free = size
        self.released = asyncio.Event()
        self.turn = asyncio.Lock()


class Reservation:
    """What one request holds of a budget, 0 at first; a `with` block gives it back."""

    def __init__(self, budget: Budget) -> None:
        self._budget = budget
        self.amount = 0

    def grow(self, amount: int) -> None:
        """Hold at least this amount.

        Raises:
            Overloaded: there is not so much left.
        """
        more = amount - self.amount
        if more <= 0:
            return
        if more > self._budget.free:
            raise Overloaded("The service has as much to do as it can take. Try again later.")
        self._budget.free -= more
        self.amount = amount

    async def wait(self, amount: int) -> None:
        """Hold this amount, or the whole budget where that is less, first come, first served."""
        amount = min(amount, self._budget.size)
        async with self._budget.turn:
            while amount > self._budget.free:
                self._budget.released.clear()
                await self._budget.released.wait()
            self.grow(amount)

    def release(self) -> None:
        """Give everything back."""
        self._budget.free += self.amount
        self._budget.released.set()
        self.amount = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


class Limits:
    """The gateway's budgets: requests that are in, bytes of bodies received, slots of work in
    flight, and bytes of responses that their clients have not read.

    A request beyond the first budget, or whose body is beyond the second, is refused at once. Slots
    and responses are waited for: how many can wait is bounded by the number of requests.
    """

    def __init__(self, max_in_flight: int, max_waiting: int, max_buffered_bytes: int) -> None:
        self.requests = Budget(max_in_flight + max_waiting)
        self.bodies = Budget(max_buffered_bytes)
        self.slots = Budget(max_in_flight)
        self.responses = Budget(max_buffered_bytes)

"""How much the gateway takes on at one time: requests, bytes of bodies, and work in flight."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Self

from gateway.errors import Overloaded

SLOT_BYTES = 16 * 2**20
"""Memory of one request in flight at 512x512: images, tensors, and a flow of 5 MB as JSON."""


class Budget:
    """Bytes of one kind that all requests together may hold. For one event loop."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.free = size
        self.released = asyncio.Event()


class Reservation:
    """Bytes that one request holds of a budget, none at first; a block of `with` releases them."""

    def __init__(self, budget: Budget) -> None:
        self._budget = budget
        self.size = 0

    def grow(self, size: int) -> None:
        """Hold `size` bytes at least.

        Raises:
            Overloaded: all requests together would hold more than the budget.
        """
        more = size - self.size
        if more <= 0:
            return
        if more > self._budget.free:
            raise Overloaded("Too many large requests are being received. Try again later.")
        self._budget.free -= more
        self.size = size

    async def wait(self, size: int) -> None:
        """Hold `size` bytes, or everything where that is less, as soon as so much is free."""
        size = min(size, self._budget.size)
        while size > self._budget.free:
            self._budget.released.clear()
            await self._budget.released.wait()
        self.grow(size)

    def release(self) -> None:
        """Give everything back."""
        self._budget.free += self.size
        self._budget.released.set()
        self.size = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


class Admission:
    """The limits: a number of requests, bytes of bodies, slots for work in flight, and bytes of
    answers that their clients have not read.

    The first two refuse at once. Slots let requests wait for their turn, first come first served,
    and the number of requests limits how many can wait. Who has an answer keeps the slots until
    the answer is counted itself. All from one event loop.
    """

    def __init__(self, max_in_flight: int, max_waiting: int, max_buffered_bytes: int) -> None:
        self.slots = max_in_flight
        self.free_slots = max_in_flight
        self.places = max_in_flight + max_waiting
        self.admitted = 0
        self.bodies = Budget(max_buffered_bytes)
        self.answers = Budget(max_buffered_bytes)
        self._queue: deque[tuple[int, asyncio.Future[None]]] = deque()

    @contextmanager
    def enter(self) -> Iterator[None]:
        """Count a request in, until its answer is sent.

        Raises:
            Overloaded: as many requests are in already as may be.
        """
        if self.admitted >= self.places:
            raise Overloaded("As many requests are being served as can be. Try again later.")
        self.admitted += 1
        try:
            yield
        finally:
            self.admitted -= 1

    @asynccontextmanager
    async def in_flight(self, size: int) -> AsyncIterator[None]:
        """Wait for slots for work that takes `size` bytes, and hold them.

        Work larger than everything waits for all of the slots and runs alone.
        """
        weight = min(self.slots, max(1, -(-size // SLOT_BYTES)))
        await self._acquire(weight)
        try:
            yield
        finally:
            self._release(weight)

    async def _acquire(self, weight: int) -> None:
        if not self._queue and self.free_slots >= weight:
            self.free_slots -= weight
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._queue.append((weight, turn))
        try:
            await turn
        except asyncio.CancelledError:
            # Granted and cancelled at one time: hand it on. Otherwise the next may fit.
            self._release(0 if turn.cancelled() else weight)
            raise

    def _release(self, weight: int) -> None:
        self.free_slots += weight
        while self._queue:
            weight, turn = self._queue[0]
            if not turn.cancelled():
                if weight > self.free_slots:
                    return
                self.free_slots -= weight
                turn.set_result(None)
            self._queue.popleft()

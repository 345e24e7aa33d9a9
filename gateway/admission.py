"""How much the gateway takes on at one time: requests, bytes of bodies, and work in flight."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

from gateway.errors import Overloaded

SLOT_BYTES = 16 * 2**20
"""Memory of one request in flight at 512x512: images, tensors, and a flow of 5 MB as JSON."""


class Reservation:
    """Bytes that one request holds of the budget for bodies."""

    def __init__(self, admission: "Admission") -> None:
        self._admission = admission
        self.size = 0

    def grow(self, size: int) -> None:
        """Hold `size` bytes at least.

        Raises:
            Overloaded: all requests together would hold more than the budget.
        """
        more = size - self.size
        if more <= 0:
            return
        if more > self._admission.free_bytes:
            raise Overloaded("Too many large requests are being received. Try again later.")
        self._admission.free_bytes -= more
        self.size = size

    def release(self) -> None:
        """Give everything back."""
        self._admission.free_bytes += self.size
        self.size = 0


class Admission:
    """Three limits: a number of requests, a budget of body bytes, and slots for work in flight.

    The first two refuse at once; the third lets requests wait for their turn, first come first
    served, and the first limits how many can wait. All from one event loop.
    """

    def __init__(self, max_in_flight: int, max_waiting: int, max_buffered_bytes: int) -> None:
        self.slots = max_in_flight
        self.free_slots = max_in_flight
        self.places = max_in_flight + max_waiting
        self.admitted = 0
        self.free_bytes = max_buffered_bytes
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

    @contextmanager
    def reserve(self) -> Iterator[Reservation]:
        """A reservation of body bytes, empty at first, released at the end."""
        reservation = Reservation(self)
        try:
            yield reservation
        finally:
            reservation.release()

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

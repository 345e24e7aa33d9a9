"""Limits: nothing is lost, whatever is cancelled, and nobody overtakes."""

import asyncio
import contextlib

import pytest

from gateway.admission import SLOT_BYTES, Admission, Budget, Reservation
from gateway.errors import Overloaded


def test_requests_are_counted_in_and_out() -> None:
    admission = Admission(max_in_flight=1, max_waiting=1, max_buffered_bytes=1)
    with admission.enter(), admission.enter():
        with pytest.raises(Overloaded), admission.enter():
            pass
        assert admission.admitted == 2
    with admission.enter():
        assert admission.admitted == 1


def test_bytes_are_reserved_and_given_back() -> None:
    admission = Admission(1, 1, max_buffered_bytes=100)
    with Reservation(admission.bodies) as first, Reservation(admission.bodies) as second:
        first.grow(60)
        first.grow(50)
        second.grow(40)
        with pytest.raises(Overloaded):
            second.grow(41)
        first.release()
        second.grow(100)
    assert admission.bodies.free == 100


async def stay(order: list[str], name: str, end: str) -> None:
    """Note a beginning and, a moment later, the end."""
    order.append(name)
    await asyncio.sleep(0.01)
    order.append(f"{name} {end}")


def test_answers_wait_for_room() -> None:
    async def scenario() -> list[str]:
        budget = Budget(100)
        order = []

        async def answer(name: str, size: int) -> None:
            with Reservation(budget) as room:
                await room.wait(size)
                await stay(order, name, "sent")

        await asyncio.gather(answer("a", 60), answer("larger than all", 1000), answer("b", 40))
        assert budget.free == 100
        return order

    order = asyncio.run(asyncio.wait_for(scenario(), 20))
    assert order == ["a", "b", "a sent", "b sent", "larger than all", "larger than all sent"]


def test_slots_are_granted_in_order_and_large_work_waits_for_all() -> None:
    async def scenario() -> list[str]:
        admission = Admission(3, 10, 1)
        order: list[str] = []

        async def work(name: str, slots: int) -> None:
            async with admission.in_flight(slots * SLOT_BYTES):
                await stay(order, name, "done")

        await asyncio.gather(work("a", 2), work("b", 100), work("c", 1))
        assert admission.free_slots == 3
        return order

    assert asyncio.run(scenario()) == ["a", "a done", "b", "b done", "c", "c done"]


@pytest.mark.parametrize("seed", range(5))
def test_cancelled_waiters_lose_no_slot(seed: int) -> None:
    async def scenario() -> None:
        admission = Admission(4, 1000, 1)
        busy = 0

        async def work(i: int) -> None:
            nonlocal busy
            weight = 1 + (i * 7 + seed) % 4
            async with admission.in_flight(weight * SLOT_BYTES):
                busy += weight
                assert busy <= 4
                try:
                    await asyncio.sleep(0)
                finally:
                    busy -= weight

        tasks = [asyncio.create_task(work(i)) for i in range(200)]
        for i, task in enumerate(tasks):
            if (i * 13 + seed) % 3 == 0:
                await asyncio.sleep(0)
                task.cancel()
        for task in tasks:
            with contextlib.suppress(asyncio.CancelledError):
                await task
        assert admission.free_slots == 4

    asyncio.run(asyncio.wait_for(scenario(), 20))

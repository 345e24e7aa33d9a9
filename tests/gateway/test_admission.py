"""Budgets: cancellation loses nothing, and reservations are served in order."""

import asyncio
import contextlib

import pytest

from gateway.admission import Budget, Reservation
from gateway.errors import Overloaded


def test_reservations_are_released() -> None:
    budget = Budget(100)
    with Reservation(budget) as first, Reservation(budget) as second:
        first.grow(60)
        first.grow(50)
        second.grow(40)
        with pytest.raises(Overloaded):
            second.grow(41)
        first.release()
        second.grow(100)
    assert budget.free == 100


def test_large_reservations_wait_for_all_and_are_not_overtaken() -> None:
    async def scenario() -> list[str]:
        budget, order = Budget(3), []

        async def work(name: str, amount: int) -> None:
            with Reservation(budget) as reservation:
                await reservation.wait(amount)
                order.append(name)
                await asyncio.sleep(0.01)
                order.append(f"{name} done")

        await asyncio.gather(work("a", 2), work("b", 100), work("c", 1))
        assert budget.free == 3
        return order

    assert asyncio.run(scenario()) == ["a", "a done", "b", "b done", "c", "c done"]


@pytest.mark.parametrize("seed", range(5))
def test_cancelled_reservations_are_released(seed: int) -> None:
    async def scenario() -> None:
        budget = Budget(4)
        busy = 0

        async def work(i: int) -> None:
            nonlocal busy
            amount = 1 + (i * 7 + seed) % 4
            with Reservation(budget) as reservation:
                await reservation.wait(amount)
                busy += amount
                assert busy <= 4
                try:
                    await asyncio.sleep(0)
                finally:
                    busy -= amount

        tasks = [asyncio.create_task(work(i)) for i in range(200)]
        for i, task in enumerate(tasks):
            if (i * 13 + seed) % 3 == 0:
                await asyncio.sleep(0)
                task.cancel()
        for task in tasks:
            with contextlib.suppress(asyncio.CancelledError):
                await task
        assert budget.free == 4

    asyncio.run(asyncio.wait_for(scenario(), 20))

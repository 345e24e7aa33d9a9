"""Concurrent requests, limited in number, with results in order."""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Iterable
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


async def in_order(
    items: Iterable[Item],
    request: Callable[[Item], Awaitable[Result]],
    finish: Callable[[Item, Result], None],
    jobs: int,
    advance: Callable[[], None],
) -> None:
    """Send a request for each item, and process the results in the order of the items.

    Args:
        items: the items, each of which gets one request.
        request: returns the result for an item; up to `jobs` run at a time.
        finish: processes a result; runs in a thread, one at a time.
        jobs: number of concurrent requests.
        advance: called after each item.
    """
    pending: deque[tuple[Item, asyncio.Task[Result]]] = deque()

    async def run(item: Item) -> Result:
        return await request(item)

    async def finish_first() -> None:
        item, task = pending.popleft()
        await asyncio.to_thread(finish, item, await task)
        advance()

    try:
        for item in items:
            if len(pending) == jobs:
                await finish_first()
            pending.append((item, asyncio.create_task(run(item))))
        while pending:
            await finish_first()
    finally:
        for _, task in pending:
            task.cancel()

"""Thread pool for CPU work: decoding, resizing, encoding."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class Threads:
    """Thread pool of one event loop."""

    def __init__(self, count: int) -> None:
        self._executor = ThreadPoolExecutor(count, thread_name_prefix="gateway")
        self._free = asyncio.Semaphore(count)

    async def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call a function in a thread.

        If this is cancelled, a call that has not begun is dropped. One that has begun is waited
        for: a thread cannot be stopped, and its memory must stay counted.
        """
        async with self._free:  # keeps the executor's queue empty, which would hold dropped calls
            call = asyncio.wrap_future(self._executor.submit(function, *args, **kwargs))
            try:
                return await asyncio.shield(call)
            except asyncio.CancelledError:
                await asyncio.wait({call})
                raise

    def close(self) -> None:
        """Accept no more calls, without waiting for those that run."""
        self._executor.shutdown(wait=False)

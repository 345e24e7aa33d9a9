"""Threads for what takes a processor: decoding, resizing, encoding."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class Threads:
    """A number of threads for one event loop."""

    def __init__(self, count: int) -> None:
        self._executor = ThreadPoolExecutor(count, thread_name_prefix="gateway")
        self._free = asyncio.Semaphore(count)

    async def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call a function in a thread.

        Cancelled, it drops a call that has not begun, and waits for the end of one that has: a
        thread cannot be stopped, and what it holds is to stay counted.
        """
        async with (
            self._free
        ):  # so that the executor has no queue, which would keep what is dropped
            call = asyncio.wrap_future(self._executor.submit(function, *args, **kwargs))
            try:
                return await asyncio.shield(call)
            except asyncio.CancelledError:
                await asyncio.wait({call})
                raise

    def close(self) -> None:
        """Take no more calls, and wait for none."""
        self._executor.shutdown(wait=False)

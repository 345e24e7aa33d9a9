"""Cancelled calls in threads: dropped before they start, awaited after."""

import asyncio
import gc
import threading
import weakref

import pytest

from gateway.threads import Threads


class Body:
    """Object that a call keeps in memory."""


def test_a_running_call_is_waited_for_and_a_waiting_call_is_dropped() -> None:
    async def scenario() -> None:
        threads = Threads(1)
        began, go_on, called = threading.Event(), threading.Event(), []

        def work() -> None:
            began.set()
            go_on.wait(60)

        running = asyncio.create_task(threads.run(work))
        while not began.is_set():
            await asyncio.sleep(0.01)
        body = Body()
        gone = weakref.ref(body)
        waiting = asyncio.create_task(threads.run(called.append, body))
        del body
        await asyncio.sleep(0.01)
        running.cancel()
        waiting.cancel()
        await asyncio.wait({waiting})
        assert waiting.cancelled()
        del waiting
        gc.collect()
        assert gone() is None
        assert not running.done()
        go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await running
        assert not called
        assert await threads.run(lambda: 5) == 5
        threads.close()

    asyncio.run(asyncio.wait_for(scenario(), 60))

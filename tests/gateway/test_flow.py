"""One request's work: what it holds, for how long, and who lets it go."""

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager

import numpy as np
import pytest
from PIL import Image
from starlette.requests import Request

from gateway import flow, images
from gateway.admission import Admission
from gateway.context import Context
from gateway.errors import ClientGone
from gateway.flow import FlowService, PiecewiseResponse
from gateway.inference import Cluster
from gateway.metrics import Metrics
from gateway.settings import Settings
from tests.support.gateway_stack import as_json, encoded, picture

CONTENT = json.dumps(as_json(encoded(picture(1)), encoded(picture(2)))).encode()


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> FlowService:
    """A service whose Tritons, none, are not asked for."""
    monkeypatch.setattr(Cluster, "require", lambda *_: None)
    admission, cluster = Admission(2, 2, 2**24), Cluster([])
    threads = ThreadPoolExecutor(1)
    return FlowService(Settings(), cluster, admission, Metrics(admission, cluster), threads)


def request(client_leaves: Callable[[], bool]) -> Request:
    """A request for flow, whose client leaves at some time."""
    messages = iter([{"type": "http.request", "body": CONTENT, "more_body": False}])

    async def receive() -> dict[str, object]:
        for message in messages:
            return message
        await until(client_leaves)
        return {"type": "http.disconnect"}

    headers = [(b"content-length", str(len(CONTENT)).encode())]
    state = {"context": Context("test")}
    return Request({"type": "http", "method": "POST", "headers": headers, "state": state}, receive)


async def until(condition: Callable[[], bool]) -> None:
    """Wait until a condition holds."""
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.01)


@asynccontextmanager
async def nothing_held(service: FlowService) -> AsyncIterator[None]:
    """In the end everything is free again."""
    admission = service.admission
    yield
    await until(lambda: admission.free_slots == admission.slots)
    await until(lambda: admission.bodies.free == admission.bodies.size)
    assert admission.answers.free == admission.answers.size


def test_work_is_counted_until_its_thread_ends(
    service: FlowService, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoding, go_on = threading.Event(), threading.Event()

    def load(image: Image.Image, _: str) -> Image.Image:
        decoding.set()
        go_on.wait(60)
        return image

    async def scenario() -> None:
        admission = service.admission
        async with nothing_held(service), asynccontextmanager(service.admitted)() as room:
            with pytest.raises(ClientGone):
                await service.answer(request(decoding.is_set), "flownet2", False, room)
            assert admission.free_slots == admission.slots - 1
            assert admission.bodies.free <= admission.bodies.size - len(CONTENT)
            # The only thread is busy: the next one's call is never begun.
            with pytest.raises(ClientGone):
                await service.answer(request(lambda: True), "flownet2", False, room)
            await until(lambda: admission.bodies.free == admission.bodies.size - len(CONTENT))
            assert admission.free_slots == admission.slots - 1
            go_on.set()

    monkeypatch.setattr(images, "load", load)
    asyncio.run(scenario())


def test_an_answer_is_counted_until_it_is_sent(
    service: FlowService, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def infer(*_: object, **__: object) -> np.ndarray:
        return np.zeros((512, 512, 2), np.float32)

    async def scenario() -> None:
        answers = service.admission.answers
        async with nothing_held(service), asynccontextmanager(service.admitted)() as room:
            answer = await service.answer(request(lambda: False), "flownet2", False, room)
            assert len(answer.body) > 2**20
            assert answers.free == answers.size - len(answer.body)

    monkeypatch.setattr(Cluster, "infer", infer)
    asyncio.run(scenario())


@pytest.mark.parametrize("stuck_at", range(4))
def test_a_client_that_does_not_read_is_cut_off(
    stuck_at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever it stops reading: at the head, in the middle, or at the end."""
    context, sent = Context("test"), []

    async def send(message: dict[str, object]) -> None:
        if len(sent) == stuck_at:
            await asyncio.get_running_loop().create_future()
        sent.append(message)

    monkeypatch.setattr(flow, "SEND_GRACE_SECONDS", 0.05)
    monkeypatch.setattr(flow, "SEND_BYTES_PER_SECOND", 2**30)
    answer = PiecewiseResponse(bytes(2 * flow.SEND_BYTES))
    sending = answer({"type": "http", "state": {"context": context}}, send, send)
    asyncio.run(asyncio.wait_for(sending, 20))
    assert len(sent) == stuck_at
    assert context.outcome == "client-gone"

"""`POST /estimate_flow/`: two images in, their optical flow out."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import numpy as np
from PIL import Image
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from gateway import body, images
from gateway.admission import Admission, Reservation
from gateway.context import Context, context_of
from gateway.encoding import Flow
from gateway.errors import (
    KINDS,
    BodyTimeout,
    ClientGone,
    DeadlineExceeded,
    InvalidParameter,
    ModelFailed,
)
from gateway.inference import Cluster
from gateway.metrics import Metrics
from gateway.negotiation import ENCODINGS, Format, choose_encoding, choose_format
from gateway.settings import Settings

TIMEOUT_HEADER = "X-Request-Timeout"
SCALE_HEADERS = ("X-Scale-X-Back-Factor", "X-Scale-Y-Back-Factor")

SEND_BYTES = 256 * 1024
SEND_GRACE_SECONDS = 30.0
SEND_BYTES_PER_SECOND = 64 * 1024
"""A client that reads more slowly than this, after the grace, is cut off."""

T = TypeVar("T")


class PiecewiseResponse(Response):
    """Sends its content in pieces, each when the one before is on its way, so that what a slow
    client has not read yet stays here, and the request stays counted; but not for ever."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the answer."""
        began = asyncio.get_running_loop().time()
        try:
            for sent, message in self._messages():
                patience = SEND_GRACE_SECONDS + sent / SEND_BYTES_PER_SECOND
                async with asyncio.timeout_at(began + patience):
                    await send(message)
        except TimeoutError:  # the server closes a connection whose answer is not complete
            context_of(scope).outcome = KINDS[ClientGone].slug

    def _messages(self) -> Iterator[tuple[int, Message]]:
        """The messages, each with the number of bytes that come before it."""
        yield (
            0,
            {
                "type": "http.response.start",
                "status": self.status_code,
                "headers": self.raw_headers,
            },
        )
        for start in range(0, len(self.body), SEND_BYTES):
            piece = bytes(self.body[start : start + SEND_BYTES])
            yield start, {"type": "http.response.body", "body": piece, "more_body": True}
        yield len(self.body), {"type": "http.response.body", "body": b"", "more_body": False}


@dataclass(frozen=True)
class Answer:
    """A flow, encoded."""

    content: bytes
    encoding: str | None
    scale_x: float
    scale_y: float


@dataclass
class FlowService:
    """Does what one request asks for, within the gateway's limits."""

    settings: Settings
    cluster: Cluster
    admission: Admission
    metrics: Metrics
    threads: ThreadPoolExecutor

    async def admitted(self) -> AsyncIterator[Reservation]:
        """FastAPI dependency: a place, and room for the answer, held until the answer is sent."""
        with self.admission.enter(), Reservation(self.admission.answers) as room:
            yield room

    async def answer(
        self, request: Request, model: str, native: bool, room: Reservation
    ) -> Response:
        """Read, decode, infer, encode.

        Slots and bytes are held by the task that does it, which ends when its thread does: later
        than this, when the deadline passes or the client leaves.

        Args:
            request: the request.
            model: name of the model.
            native: whether the images are inferred at their own size.
            room: what `admitted` gave; holds the answer's bytes at the end.

        Raises:
            GatewayError: whatever is wrong; see `gateway.errors`.
        """
        context = context_of(request)
        form = choose_format(", ".join(request.headers.getlist("accept")))
        encoding = choose_encoding(", ".join(request.headers.getlist("accept-encoding")))
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._timeout(request)
        self.cluster.require(model, self.settings.default_model)
        with ExitStack() as held:
            reservation = held.enter_context(Reservation(self.admission.bodies))
            job = Job(
                await self._read(request, context, reservation, deadline),
                request.headers.get("content-type", ""),
                model,
                native,
                form,
                encoding if form.compressible else None,
                deadline,
            )
            task = asyncio.create_task(self._infer(job, reservation, room, context))
            owned = held.pop_all()

        def ended(task: asyncio.Task[Answer]) -> None:
            owned.close()
            if not task.cancelled():
                task.exception()  # somebody else has it, or nobody cares any more

        task.add_done_callback(ended)
        answer = await self._until(deadline, request.receive, task)
        self.metrics.answer_bytes.observe(len(answer.content))
        headers = {
            SCALE_HEADERS[0]: repr(answer.scale_x),
            SCALE_HEADERS[1]: repr(answer.scale_y),
            "Vary": "Accept, Accept-Encoding",
            **({"Content-Encoding": answer.encoding} if answer.encoding else {}),
        }
        return PiecewiseResponse(answer.content, 200, headers, form.media_type)

    def _timeout(self, request: Request) -> float:
        header = request.headers.get(TIMEOUT_HEADER)
        if header is None:
            return self.settings.default_timeout_s
        try:
            seconds = float(header)
        except ValueError:
            seconds = 0.0
        if not 0 < seconds < float("inf"):
            raise InvalidParameter(
                f"{TIMEOUT_HEADER} must be a positive number of seconds.", field=TIMEOUT_HEADER
            )
        return min(seconds, self.settings.max_timeout_s)

    async def _read(
        self, request: Request, context: Context, reservation: Reservation, deadline: float
    ) -> bytearray:
        try:
            with context.stage("read"):
                async with asyncio.timeout_at(deadline):
                    content = await body.read(request, self.settings.max_body_bytes, reservation)
        except TimeoutError:
            raise BodyTimeout("The body did not arrive before the request's deadline.") from None
        except ClientDisconnect:
            raise ClientGone("The client closed the connection.") from None
        self.metrics.body_bytes.observe(len(content))
        return content

    async def _until(self, deadline: float, receive: Receive, task: asyncio.Task[T]) -> T:
        """What a task returns, unless the deadline passes or the client goes away first.

        Then the task is cancelled, and nobody waits for its end.
        """
        watch = asyncio.create_task(_disconnected(receive))
        try:
            async with asyncio.timeout_at(deadline):
                await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
                if not task.done():
                    raise ClientGone("The client closed the connection.")
                return await task
        except TimeoutError:
            raise DeadlineExceeded(
                f"The flow was not ready before the request's deadline; "
                f"{TIMEOUT_HEADER} sets it, up to {self.settings.max_timeout_s:g} seconds."
            ) from None
        finally:
            task.cancel()
            watch.cancel()

    async def _infer(
        self, job: "Job", reservation: Reservation, room: Reservation, context: Context
    ) -> Answer:
        run = self._run
        pair, working_bytes = await run(job.open, self.settings, context)
        size = next(iter(pair.values())).size
        self.metrics.image_pixels.observe(size[0] * size[1])
        queued = time.perf_counter()
        async with self.admission.in_flight(working_bytes):
            context.stages["queue"] = time.perf_counter() - queued
            image1, image2 = await run(job.prepare, pair, context)
            reservation.release()
            with context.stage("infer"):
                flow = await self.cluster.infer(
                    job.model,
                    image1,
                    image2,
                    deadline=job.deadline,
                    request_id=context.request_id,
                    headers=context.trace_headers,
                )
            with context.stage("encode"):
                answer = await run(job.encode, flow, size)
            await room.wait(len(answer.content))
            return answer

    async def _run(self, function: Callable[..., T], *arguments: object) -> T:
        """Call a function in a thread.

        Cancelled, it drops a call that has not begun, and waits for the end of one that has: a
        thread cannot be stopped, and what it holds is to stay counted.
        """
        call = [partial(function, *arguments)]

        def begin() -> T:
            return call.pop()()

        queued = self.threads.submit(begin)
        result = asyncio.wrap_future(queued)
        try:
            return await asyncio.shield(result)
        except asyncio.CancelledError:
            if queued.cancel():
                call.clear()  # the queue keeps the rest until its turn
            else:
                await asyncio.wait({result})
            raise


@dataclass
class Job:
    """One request's work that runs in threads."""

    content: bytearray
    content_type: str
    model: str
    native: bool
    form: Format
    encoding: str | None
    deadline: float

    def open(self, settings: Settings, context: Context) -> tuple[dict[str, Image.Image], int]:
        """Parse the body and the images' headers; the images, and the memory they will take."""
        content, self.content = self.content, bytearray()
        with context.stage("decode"):
            files = body.parse(content, self.content_type)
            pair = images.open_pair(files, settings.image_formats, settings.max_image_pixels)
        if self.native:
            for field, image in pair.items():
                images.check_native(image, field, settings.max_native_pixels)
        return pair, images.working_bytes(pair, self.native)

    def prepare(self, pair: dict[str, Image.Image], context: Context) -> list[images.Pixels]:
        """Make the images what the model takes, one after the other, each let go in between."""
        prepared = []
        for field in list(pair):
            with context.stage("decode"):
                image = images.load(pair.pop(field), field)
            with context.stage("resize"):
                prepared.append(images.to_rgb(image, field, self.native))
            del image
        return prepared

    def encode(self, flow: Flow, size: tuple[int, int]) -> Answer:
        """Scale the flow back to the images' own pixels, and encode it."""
        scale_x, scale_y = 1.0, 1.0
        if not self.native:
            scale_x, scale_y = (own / grid for own, grid in zip(size, images.GRID, strict=True))
            flow = flow * np.array([scale_x, scale_y], np.float32)
        if not np.isfinite(flow).all():
            raise ModelFailed("The model answered values that are not finite.")
        content = self.form.encode(flow, scale_x, scale_y)
        if self.encoding:
            content = ENCODINGS[self.encoding](content)
        return Answer(content, self.encoding, scale_x, scale_y)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass

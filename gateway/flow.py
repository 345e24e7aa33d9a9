"""`POST /estimate_flow/`: two images in, their optical flow out."""

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
from fastapi import APIRouter, Depends, Header, Query, Request
from PIL import Image
from pydantic.json_schema import SkipJsonSchema
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive

from flownet2 import contract, measures
from flownet2.formats import Flow
from gateway import body, images
from gateway.admission import SLOT_BYTES, Reservation
from gateway.context import Context, context_of
from gateway.errors import BodyTimeout, ClientGone, DeadlineExceeded, GatewayError
from gateway.negotiation import ENCODINGS, Estimate, Format, choose_encoding, choose_format
from gateway.response import PiecewiseResponse
from gateway.schemas import FLOW_REQUEST, FLOW_RESPONSE, SCALE_HEADERS, error_responses
from gateway.settings import Settings
from gateway.state import SharedState, State

TIMEOUT_HEADER = "X-Request-Timeout"
Direction = Literal["forward", "backward", "both"]

router = APIRouter()


async def _admitted(state: SharedState) -> AsyncIterator[Reservation]:
    """Count the request, and reserve bytes for its response, until that is sent."""
    with (
        Reservation(state.limits.requests) as admitted,
        Reservation(state.limits.responses) as response_bytes,
    ):
        admitted.grow(1)
        yield response_bytes


@router.post(
    "/estimate_flow/",
    summary="Estimate optical flow",
    response_class=Response,
    responses=error_responses(*(one for one in GatewayError.__subclasses__() if one.of_flow))
    | {200: FLOW_RESPONSE},
    openapi_extra={"requestBody": FLOW_REQUEST},
)
@router.post("/estimate_flow", include_in_schema=False)
async def estimate_flow(
    request: Request,
    state: SharedState,
    response_bytes: Annotated[Reservation, Depends(_admitted)],
    size: Annotated[
        Literal["512", "native"],
        Query(
            description="`512`: the images are resized to 512x512 and the flow is on that "
            "grid, in pixels of the original images. `native`: the images' own size."
        ),
    ] = "512",
    model: Annotated[
        str | SkipJsonSchema[None],
        Query(description="a name from `/models`; left out: the default model", max_length=128),
    ] = None,
    direction: Annotated[
        Direction,
        Query(
            description="`forward`: from the first image to the second. `backward`: the reverse. "
            "`both`: the two, and the pixels of the first image that the second does not show; "
            "as JSON or .npz."
        ),
    ] = "forward",
    timeout: Annotated[
        float | SkipJsonSchema[None],
        Header(
            alias=TIMEOUT_HEADER,
            description="seconds that the response may take",
            gt=0,
            allow_inf_nan=False,
        ),
    ] = None,
) -> Response:
    """The optical flow from the first image to the second, or the reverse, or both.

    Both images are resized to 512x512, then converted to RGB; EXIF orientation is ignored.
    The flow is already multiplied by the back factors: a client resizes the matrix to the
    images' size and multiplies nothing.
    """
    settings, context = state.settings, context_of(request)
    model = model or settings.default_model
    accept = ", ".join(request.headers.getlist("accept"))
    format = choose_format(accept, both_directions=direction == "both")
    encoding = choose_encoding(", ".join(request.headers.getlist("accept-encoding")))
    seconds = min(timeout or settings.default_timeout_s, settings.max_timeout_s)
    deadline = asyncio.get_running_loop().time() + seconds
    state.cluster.require(model)
    body_bytes = Reservation(state.limits.bodies)
    try:
        content = await _read(request, state, context, body_bytes, deadline)
    except BaseException:
        body_bytes.release()
        raise
    job = Job(
        content,
        request.headers.get("content-type", ""),
        model,
        size == "native",
        direction,
        format,
        encoding if format.compressible else None,
        deadline,
        context,
    )
    # What the work holds it keeps until its thread ends: later than this function, where the
    # deadline passes or the client leaves.
    task = asyncio.create_task(_estimate(state, job, body_bytes, response_bytes))

    def ended(task: asyncio.Task[EncodedFlow]) -> None:
        body_bytes.release()
        if not task.cancelled():
            task.exception()  # or asyncio logs it, where nobody waits for the task any more

    task.add_done_callback(ended)
    flow = await _wait_for(task, deadline, request.receive, settings.max_timeout_s)
    state.metrics.response_bytes.observe(len(flow.content))
    headers = dict(zip(SCALE_HEADERS, map(repr, flow.scale), strict=True))
    headers["Vary"] = "Accept, Accept-Encoding"
    if job.encoding:
        headers["Content-Encoding"] = job.encoding
    return PiecewiseResponse(flow.content, 200, headers, format.media_type)


async def _read(
    request: Request, state: State, context: Context, body_bytes: Reservation, deadline: float
) -> bytearray:
    try:
        with context.stage("read"):
            async with asyncio.timeout_at(deadline):
                content = await body.read(request, state.settings.max_body_bytes, body_bytes)
    except TimeoutError:
        raise BodyTimeout("The body did not arrive before the request's deadline.") from None
    except ClientDisconnect:
        raise ClientGone("The client closed the connection.") from None
    state.metrics.body_bytes.observe(len(content))
    return content


@dataclass(frozen=True)
class EncodedFlow:
    """A flow as it is sent, and the back factors of x and y."""

    content: bytes
    scale: tuple[float, float]


async def _wait_for(
    task: "asyncio.Task[EncodedFlow]", deadline: float, receive: Receive, max_timeout_s: float
) -> EncodedFlow:
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
            f"{TIMEOUT_HEADER} sets it, up to {max_timeout_s:g} seconds."
        ) from None
    finally:
        task.cancel()
        watch.cancel()


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _estimate(
    state: State, job: "Job", body_bytes: Reservation, response_bytes: Reservation
) -> EncodedFlow:
    """Decode, infer, encode."""
    context, run = job.context, state.threads.run
    pair = await run(job.open, state.settings)
    width, height = next(iter(pair.values())).size
    state.metrics.image_pixels.observe(width * height)
    queued = time.perf_counter()
    with Reservation(state.limits.slots) as slots:
        weight = max(1, -(-images.working_bytes(pair, job.native) // SLOT_BYTES))
        await slots.wait(weight * (2 if job.direction == "both" else 1))
        context.stages["queue"] = time.perf_counter() - queued
        batches = await run(job.prepare, pair)
        body_bytes.release()
        with context.stage("infer"):
            flows = [
                flow
                for image1, image2 in batches
                for flow in await state.cluster.infer(
                    job.model,
                    image1,
                    image2,
                    deadline=job.deadline,
                    request_id=context.request_id,
                    headers=context.trace_headers,
                )
            ]
        with context.stage("encode"):
            encoded = await run(job.encode, flows, (width, height))
        await response_bytes.wait(len(encoded.content))
        return encoded


@dataclass
class Job:
    """What one request asks for, and the parts of its work that run in threads."""

    content: bytearray
    content_type: str
    model: str
    native: bool
    direction: Direction
    format: Format
    encoding: str | None
    deadline: float
    context: Context

    def open(self, settings: Settings) -> dict[str, Image.Image]:
        """Parse the body and the images' headers."""
        content, self.content = self.content, bytearray()
        with self.context.stage("decode"):
            files = body.parse(content, self.content_type)
            pair = images.open_pair(files, settings.image_formats, settings.max_image_pixels)
        if self.native:
            for field, image in pair.items():
                images.check_native(image, field, settings.max_native_pixels)
        return pair

    def prepare(self, pair: dict[str, Image.Image]) -> list[tuple[images.Pixels, images.Pixels]]:
        """Make the images what the model takes, one after the other, each let go in between.

        Returns:
            First and second images of one batch or two, uint8 [N, H, W, 3].
        """
        prepared = []
        for field in list(pair):
            with self.context.stage("decode"):
                image = images.load(pair.pop(field), field)
            with self.context.stage("resize"):
                prepared.append(images.to_rgb(image, field, self.native))
            del image
        first, second = (image[None] for image in prepared)
        if self.direction == "forward":
            return [(first, second)]
        if self.direction == "backward":
            return [(second, first)]
        if max(first.shape) > contract.BATCH_EDGE:
            return [(first, second), (second, first)]
        return [(np.concatenate([first, second]), np.concatenate([second, first]))]

    def encode(self, flows: list[Flow], size: tuple[int, int]) -> EncodedFlow:
        """Scale the flows back to the images' own pixels, and encode them."""
        occluded = measures.occluded(*flows) if self.direction == "both" else None
        scale = (1.0, 1.0)
        if not self.native:
            scale = (size[0] / images.GRID[0], size[1] / images.GRID[1])
            flows = [_scaled(flow, scale) for flow in flows]
        flow, *backward = flows
        estimate = Estimate(flow, scale, backward[0] if backward else None, occluded)
        content = self.format.encode(estimate)
        if self.encoding:
            content = ENCODINGS[self.encoding](content)
        return EncodedFlow(content, scale)


def _scaled(flow: Flow, scale: tuple[float, float]) -> Flow:
    """A flow with u and v multiplied by a factor each."""
    rows = flow.reshape(len(flow), -1)  # NumPy is slow along an axis of two
    factors = np.tile(np.array(scale, np.float32), flow.shape[1])
    return (rows * factors).reshape(flow.shape)

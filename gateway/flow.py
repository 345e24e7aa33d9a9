"""`POST /estimate_flow/`: two images in, their optical flow out."""

import asyncio
from collections.abc import AsyncIterator
from typing import Annotated, Literal

from fastapi import APIRouter, Depends, Header, Query, Request
from pydantic.json_schema import SkipJsonSchema
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive

from gateway import body
from gateway.admission import Reservation
from gateway.context import Context, context_of
from gateway.errors import BodyTimeout, ClientGone, DeadlineExceeded, GatewayError
from gateway.estimate import Direction, EncodedFlow, Job, estimate
from gateway.negotiation import choose_encoding, choose_format
from gateway.response import PiecewiseResponse
from gateway.schemas import FLOW_REQUEST, FLOW_RESPONSE, SCALE_HEADERS, error_responses
from gateway.state import SharedState, State

TIMEOUT_HEADER = "X-Request-Timeout"

router = APIRouter()


async def _admitted(state: SharedState) -> AsyncIterator[Reservation]:
    """Count the request until its response is sent, and yield the reservation of its response.

    Raises:
        Overloaded: there are too many requests.
    """
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
    responses=error_responses(*(error for error in GatewayError.__subclasses__() if error.of_flow))
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
            description="`512`: the images are resized to 512x512, and the flow is on that grid, "
            "in pixels of the original images. `native`: the images keep their size."
        ),
    ] = "512",
    model: Annotated[
        str | SkipJsonSchema[None],
        Query(description="name of a model from `/models`; default: its default", max_length=128),
    ] = None,
    direction: Annotated[
        Direction,
        Query(
            description="`forward`: from the first image to the second. `backward`: the reverse. "
            "`both`: both, and the occluded pixels of the first image; as JSON or .npz only."
        ),
    ] = "forward",
    timeout: Annotated[
        float | SkipJsonSchema[None],
        Header(
            alias=TIMEOUT_HEADER,
            description="deadline of the response in seconds",
            gt=0,
            allow_inf_nan=False,
        ),
    ] = None,
) -> Response:
    """Estimate the optical flow from the first image to the second, the reverse, or both.

    By default both images are resized to 512x512, then converted to RGB; EXIF orientation is
    ignored. The flow is already multiplied by the back factors: resize the matrix to the size of
    your images, and multiply nothing.
    """
    settings, context = state.settings, context_of(request)
    accept = ", ".join(request.headers.getlist("accept"))
    format = choose_format(accept, both_directions=direction == "both")
    encoding = choose_encoding(", ".join(request.headers.getlist("accept-encoding")))
    seconds = min(timeout or settings.default_timeout_s, settings.max_timeout_s)
    deadline = asyncio.get_running_loop().time() + seconds
    served = state.cluster.require(model or settings.default_model)
    body.check_headers(request)
    body_bytes = Reservation(state.limits.bodies)
    try:
        content = await _read(request, state, context, body_bytes, deadline)
    except BaseException:
        body_bytes.release()
        raise
    job = Job(
        content=content,
        content_type=request.headers.get("content-type", ""),
        model=served,
        native=size == "native",
        direction=direction,
        format=format,
        encoding=encoding if format.compressible else None,
        deadline=deadline,
        context=context,
    )
    # The task keeps its reservations until its thread ends, which may be after this function
    # returns if the deadline passes or the client disconnects.
    task = asyncio.create_task(estimate(state, job, body_bytes, response_bytes))

    def ended(task: asyncio.Task[EncodedFlow]) -> None:
        body_bytes.release()
        if not task.cancelled():
            task.exception()  # or asyncio logs the error of a task that was abandoned

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
    """Read the body before the deadline.

    Raises:
        BodyTimeout, ClientGone, and what `body.read` raises.
    """
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


async def _wait_for(
    task: asyncio.Task[EncodedFlow], deadline: float, receive: Receive, max_timeout_s: float
) -> EncodedFlow:
    """Return the task's result. Cancel the task if the deadline passes or the client disconnects.

    Raises:
        DeadlineExceeded, ClientGone, and what the task raises.
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
    """Return when the client has closed the connection."""
    while (await receive())["type"] != "http.disconnect":
        pass

"""The application: routes, errors, and the OpenAPI document."""

import contextlib
import logging
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Any, Literal

from fastapi import Depends, FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException
from starlette.responses import Response

from gateway import __version__, errors, images, metrics, openapi
from gateway.admission import Admission, Reservation
from gateway.context import context_of
from gateway.errors import GatewayError
from gateway.flow import SCALE_HEADERS, FlowService
from gateway.inference import Cluster
from gateway.middleware import (
    QUIET,
    ApiKeyMiddleware,
    ContextMiddleware,
    SecurityHeadersMiddleware,
    read_keys,
)
from gateway.page import add_page
from gateway.settings import Settings

log = logging.getLogger("gateway")

LOAD = (errors.Overloaded, errors.QueueFull, errors.InferenceUnavailable)


class Status(BaseModel):
    """What a probe answers."""

    status: str


class ServedModel(BaseModel):
    """A network that is loaded, and whose weights it has."""

    name: str = Field(description="for `?model=`")
    version: str
    network: str | None = Field(description="name of the network's architecture")
    parameters: int | None = Field(description="number of weights and biases")
    weights_source: str | None
    weights_license: str | None
    default: bool = Field(description="whether it answers requests without `?model=`")


class Models(BaseModel):
    """The networks that are loaded."""

    models: list[ServedModel]


class EndpointHealth(BaseModel):
    """One Triton, as last seen."""

    address: str
    serving: bool
    version: str = Field(description="Triton's version; empty while it was never reached")
    models: list[str]
    trouble: str


class Health(BaseModel):
    """The gateway and what it stands on."""

    status: Literal["ok", "unavailable", "stopping"]
    version: str = Field(description="the gateway's version")
    model: ServedModel | None = Field(description="the default model, while it is served")
    triton: list[EndpointHealth]


def create_app(settings: Settings) -> FastAPI:
    """The gateway as an ASGI application.

    Raises:
        ValueError: a setting cannot be used; the message names it.
    """
    images.configure_pillow(settings.max_image_pixels, settings.image_formats)
    cluster = Cluster(settings.triton_endpoints)
    admission = Admission(settings.max_in_flight, settings.max_waiting, settings.max_buffered_bytes)
    measured = metrics.Metrics(admission, cluster)
    threads = ThreadPoolExecutor(settings.threads, thread_name_prefix="gateway")
    service = FlowService(settings, cluster, admission, measured, threads)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        cluster.start()
        yield
        await cluster.close()
        threads.shutdown(wait=False, cancel_futures=True)

    app = FastAPI(
        title="FlowNet2",
        version=__version__,
        summary="Optical flow between two images, by FlowNet 2.0 on NVIDIA Triton.",
        license_info={"name": "GPL-3.0-or-later", "identifier": "GPL-3.0-or-later"},
        lifespan=lifespan,
        redirect_slashes=False,
        docs_url=None,
        redoc_url=None,
    )
    app.state.stopping = False
    _add_middleware(app, settings, measured)
    _add_error_handlers(app, settings, measured)
    _add_flow(app, settings, service)
    _add_reports(app, settings, cluster, measured)
    add_page(app)
    openapi.declare_problem(app)
    return app


def _add_middleware(app: FastAPI, settings: Settings, measured: metrics.Metrics) -> None:
    """Innermost first."""
    retry = settings.retry_after_s
    if settings.api_keys_file:
        app.add_middleware(
            ApiKeyMiddleware, keys=read_keys(settings.api_keys_file), retry_after_s=retry
        )
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=[*SCALE_HEADERS, "X-Request-ID", "Server-Timing", "Retry-After"],
        )
    if settings.otlp_endpoint:
        from gateway import tracing  # noqa: PLC0415  an extra

        provider = tracing.start(settings.otlp_endpoint)
        app.add_middleware(tracing.TracingMiddleware, tracer=provider.get_tracer("gateway"))
    app.add_middleware(ContextMiddleware, metrics=measured, retry_after_s=retry)
    app.add_middleware(SecurityHeadersMiddleware)


def _add_error_handlers(app: FastAPI, settings: Settings, measured: metrics.Metrics) -> None:
    async def on_gateway_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, GatewayError)
        context = context_of(request)
        context.outcome = errors.KINDS[type(error)].slug
        if isinstance(error, LOAD) and request.url.path not in QUIET:
            measured.rejected.labels(context.outcome).inc()
        if isinstance(error, errors.ModelFailed):
            log.error("%s", error.detail, extra={"request_id": context.request_id})
        return errors.problem(error, context.request_id, settings.retry_after_s)

    async def on_http_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        if error.status_code == errors.KINDS[errors.MethodNotAllowed].status:
            allowed = dict(error.headers or {})
            return await on_gateway_error(
                request,
                errors.MethodNotAllowed(
                    f"Use {allowed.get('Allow', 'another method')}.", headers=allowed
                ),
            )
        return await on_gateway_error(
            request, errors.NotFound("The API is described at /docs; flow is at /estimate_flow/.")
        )

    async def on_invalid(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        first = error.errors()[0]
        name = str(first["loc"][-1])
        return await on_gateway_error(
            request, errors.InvalidParameter(f"{name}: {first['msg']}.", field=name)
        )

    async def on_memory_error(request: Request, _: Exception) -> Response:
        return await on_gateway_error(
            request, errors.Overloaded("The gateway is out of memory. Try again later.")
        )

    app.add_exception_handler(GatewayError, on_gateway_error)
    app.add_exception_handler(HTTPException, on_http_error)
    app.add_exception_handler(RequestValidationError, on_invalid)
    app.add_exception_handler(MemoryError, on_memory_error)


def _add_flow(app: FastAPI, settings: Settings, service: FlowService) -> None:
    async def estimate_flow(
        request: Request,
        size: Annotated[
            Literal["512", "native"],
            Query(
                description="`512`: the images are resized to 512x512 and the flow is on that "
                "grid, in pixels of the original images. `native`: the images' own size."
            ),
        ] = "512",
        model: Annotated[
            str,
            Query(
                description="a name from `/models`; the default model if left out",
                max_length=128,
            ),
        ] = settings.default_model,
        *,
        room: Annotated[Reservation, Depends(service.admitted)],
    ) -> Response:
        """The optical flow from the first image to the second.

        Both images are resized to 512x512, then converted to RGB; EXIF orientation is ignored.
        The flow is already multiplied by the back factors: a client resizes the matrix to the
        images' size and multiplies nothing.

        The header `X-Request-Timeout` sets how many seconds the answer may take.
        """
        return await service.answer(request, model, size == "native", room)

    declared: dict[str, Any] = {
        "summary": "Estimate optical flow",
        "responses": openapi.errors(
            errors.BadJson,
            errors.BadMultipart,
            *([errors.Unauthorized] if settings.api_keys_file else []),
            errors.UnknownModel,
            errors.MethodNotAllowed,
            errors.NotAcceptable,
            errors.BodyTimeout,
            errors.BodyTooLarge,
            errors.ImageTooLarge,
            errors.UnsupportedMediaType,
            errors.UnsupportedImageFormat,
            errors.InvalidParameter,
            errors.MissingField,
            errors.UnexpectedField,
            errors.WrongType,
            errors.BadBase64,
            errors.NotAnImage,
            errors.DamagedImage,
            errors.AnimatedImage,
            errors.ImageTooSmall,
            errors.SizesDiffer,
            errors.InternalError,
            errors.ModelFailed,
            *LOAD,
            errors.DeadlineExceeded,
        )
        | {200: openapi.flow_response()},
        "response_class": Response,
        "openapi_extra": {"requestBody": openapi.flow_request()},
    }
    app.post("/estimate_flow/", **declared)(estimate_flow)
    app.post("/estimate_flow", include_in_schema=False, **declared)(estimate_flow)


def _add_reports(
    app: FastAPI, settings: Settings, cluster: Cluster, measured: metrics.Metrics
) -> None:
    def served() -> list[ServedModel]:
        return [
            ServedModel(**vars(model), default=name == settings.default_model)
            for name, model in sorted(cluster.models().items())
        ]

    @app.get("/models", responses=openapi.errors(errors.MethodNotAllowed))
    async def models() -> Models:
        """The networks that are loaded, with the source and licence of their weights."""
        return Models(models=served())

    @app.head("/livez", include_in_schema=False)
    @app.get("/livez")
    async def livez() -> Status:
        """Whether the process answers."""
        return Status(status="ok")

    @app.head("/readyz", include_in_schema=False)
    @app.get(
        "/readyz",
        responses=openapi.errors(errors.InferenceUnavailable, errors.Stopping),
    )
    async def readyz() -> Status:
        """Whether requests for flow are answered: some Triton serves the default model."""
        if app.state.stopping:
            raise errors.Stopping("The gateway is shutting down.")
        cluster.require(settings.default_model, settings.default_model)
        return Status(status="ok")

    @app.head("/healthz", include_in_schema=False)
    @app.get("/healthz")
    async def healthz() -> Health:
        """Versions and states of the gateway, of every Triton, and of the default model."""
        default = next((model for model in served() if model.default), None)
        ok: Literal["ok", "unavailable"] = "ok" if default else "unavailable"
        return Health(
            status="stopping" if app.state.stopping else ok,
            version=__version__,
            model=default,
            triton=[
                EndpointHealth(
                    address=endpoint.address,
                    serving=bool(endpoint.models),
                    version=endpoint.version,
                    models=sorted(endpoint.models),
                    trouble=endpoint.trouble,
                )
                for endpoint in cluster.endpoints
            ],
        )

    @app.head("/metrics", include_in_schema=False)
    @app.get(
        "/metrics",
        response_class=Response,
        responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
    )
    async def prometheus() -> Response:
        """Metrics in Prometheus' text format."""
        return Response(measured.exposition(), media_type=metrics.CONTENT_TYPE)

"""The ASGI application: routes, middleware, error handlers."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from typing import Any

from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

import flownet2
from gateway import images
from gateway.context import context_of
from gateway.errors import (
    GatewayError,
    InvalidParameter,
    MethodNotAllowed,
    ModelFailed,
    NotFound,
    Overloaded,
    Problem,
)
from gateway.flow import router as flow
from gateway.keys import require_key
from gateway.middleware import QUIET, ContextMiddleware, Cors, SecurityHeadersMiddleware
from gateway.page import add_page
from gateway.reports import probes, reports
from gateway.schemas import SCALE_HEADERS
from gateway.settings import Settings
from gateway.state import State

log = logging.getLogger("gateway")


def create_app(settings: Settings) -> FastAPI:
    """Return the gateway as an ASGI application; `app.state.gateway` is its `State`.

    Raises:
        ValueError: a setting is invalid; the message names it.
    """
    images.configure_pillow(settings.max_image_pixels, settings.image_formats)
    state = State(settings)
    with_key = [Depends(require_key)]

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await state.cluster.start()
        gauges = asyncio.create_task(state.metrics.keep_current())
        yield
        gauges.cancel()
        await state.cluster.close()
        state.threads.close()

    app = FastAPI(
        title="FlowNet2",
        version=flownet2.__version__,
        summary="Optical flow between two images, by FlowNet 2.0 on NVIDIA Triton.",
        license_info={"name": "GPL-3.0-or-later", "identifier": "GPL-3.0-or-later"},
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        generate_unique_id_function=lambda route: route.name,
    )
    app.state.gateway = state
    app.include_router(flow, dependencies=with_key)
    app.include_router(reports, dependencies=with_key)
    app.include_router(probes)
    add_page(app)
    _add_middleware(app, state)
    app.add_exception_handler(GatewayError, _on_gateway_error)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(RequestValidationError, _on_invalid_parameter)
    app.add_exception_handler(MemoryError, _on_memory_error)
    _complete_openapi(app, key_needed=settings.api_keys_file is not None)
    return app


def _add_middleware(app: FastAPI, state: State) -> None:
    """Add the middleware, innermost first."""
    settings = state.settings
    if settings.cors_origins:
        app.add_middleware(
            Cors,
            allow_origins=settings.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=[*SCALE_HEADERS, "X-Request-ID", "Server-Timing", "Retry-After"],
        )
    if settings.otlp_endpoint:
        from gateway import tracing  # noqa: PLC0415  an extra

        app.add_middleware(
            tracing.TracingMiddleware, provider=tracing.provider(settings.otlp_endpoint)
        )
    app.add_middleware(
        ContextMiddleware, metrics=state.metrics, retry_after_s=settings.retry_after_s
    )
    app.add_middleware(SecurityHeadersMiddleware)


async def _on_gateway_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, GatewayError)
    state: State = request.app.state.gateway
    context = context_of(request)
    context.outcome = error.slug
    if error.status == 503 and request.url.path not in QUIET:
        state.metrics.rejected.labels(error.slug).inc()
    if isinstance(error, ModelFailed):
        log.error("%s", error.detail, extra={"request_id": context.request_id})
    return error.response(context.request_id, state.settings.retry_after_s)


async def _on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if error.status_code == MethodNotAllowed.status:
        allowed = dict(error.headers or {})
        detail = f"Use {allowed.get('Allow', 'another method')}."
        return await _on_gateway_error(request, MethodNotAllowed(detail, headers=allowed))
    return await _on_gateway_error(
        request, NotFound("The API is documented at /docs; send images to /estimate_flow/.")
    )


async def _on_invalid_parameter(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    name = str(first["loc"][1])
    return await _on_gateway_error(
        request, InvalidParameter(f"{name}: {first['msg']}.", field=name)
    )


async def _on_memory_error(request: Request, _: Exception) -> Response:
    return await _on_gateway_error(
        request, Overloaded("The gateway is out of memory. Try again later.")
    )


def _complete_openapi(app: FastAPI, key_needed: bool) -> None:
    """Complete the OpenAPI document: the schema of errors, which no route returns as a model, and
    whether API keys are optional."""
    generate = app.openapi

    def openapi() -> dict[str, Any]:
        document = generate()
        document["components"]["schemas"]["Problem"] = Problem.model_json_schema()
        for operations in document["paths"].values():
            for operation in operations.values():
                optional = not key_needed or operation["operationId"] == "healthz"
                if "security" in operation and optional and {} not in operation["security"]:
                    operation["security"].append({})
        return document

    app.openapi = openapi  # type: ignore[method-assign]

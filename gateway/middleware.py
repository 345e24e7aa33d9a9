"""Middleware of every request: ID, log line, metrics, security headers, CORS."""

import asyncio
import logging
import re
import uuid
from dataclasses import dataclass

from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gateway.context import Context
from gateway.errors import CorsRefused, GatewayError, InferenceUnavailable, InternalError
from gateway.metrics import Metrics

log = logging.getLogger("gateway.access")

QUIET = frozenset({"/livez", "/readyz", "/healthz", "/metrics"})
"""Paths that are requested every few seconds, logged at level DEBUG."""

_BUG = "This is a bug in the gateway. Its log has the details, under this request ID."
_PLAIN_ID = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")
_TRACEPARENT = re.compile(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")


@dataclass
class ContextMiddleware:
    """Attach a context to each request, and report its outcome: headers, metrics, one log line.

    A client's `X-Request-ID` is used if it is short and plain. An exception that no handler caught
    is logged with its traceback and answered with a 500.
    """

    app: ASGIApp
    metrics: Metrics
    retry_after_s: int

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        context = Context(given if _PLAIN_ID.fullmatch(given) else uuid.uuid4().hex)
        traceparent = headers.get("traceparent", "")
        if _TRACEPARENT.fullmatch(traceparent):
            context.trace_headers["traceparent"] = traceparent
        scope.setdefault("state", {})["context"] = context
        status = 0

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                response_headers = MutableHeaders(scope=message)
                response_headers["X-Request-ID"] = context.request_id
                response_headers["Server-Timing"] = context.server_timing()
            await send(message)

        try:
            await self.app(scope, receive, send_with_headers)
        except (Exception, asyncio.CancelledError) as caught:
            error = caught if isinstance(caught, GatewayError) else InternalError(_BUG)
            if isinstance(caught, asyncio.CancelledError):  # the grace period of a shutdown is over
                error = InferenceUnavailable("The gateway is shutting down. Try again.")
            context.outcome = error.slug
            if isinstance(error, InternalError):
                log.exception("unhandled", extra={"request_id": context.request_id})
            if status == 0:
                response = error.response(context.request_id, self.retry_after_s)
                await response(scope, receive, send_with_headers)
        finally:
            self._report(scope, context, status)

    def _report(self, scope: Scope, context: Context, status: int) -> None:
        stages = dict(context.stages)  # a thread of an abandoned request may still add to it
        route = scope.get("route")
        path = getattr(route, "path", "other")
        self.metrics.requests.labels(path, context.outcome).inc()
        self.metrics.seconds.labels(path).observe(context.elapsed())
        for stage, seconds in stages.items():
            self.metrics.stages.labels(stage).observe(seconds)
        client = scope.get("client")
        log.log(
            logging.DEBUG if path in QUIET else logging.INFO,
            "request",
            extra={
                "request_id": context.request_id,
                "client": client[0] if client else None,
                "method": scope["method"],
                "path": scope["path"][:200],
                "status": status,
                "outcome": context.outcome,
                "seconds": round(context.elapsed(), 4),
                "stages": {name: round(value, 4) for name, value in stages.items()},
                **context.trace_headers,
            },
        )


class Cors(CORSMiddleware):
    """Starlette's CORS middleware, with rejected preflights as problem documents."""

    def preflight_response(self, request_headers: Headers) -> Response:
        """Return the response to a preflight.

        Raises:
            CorsRefused: origin, method or header is not allowed.
        """
        response = super().preflight_response(request_headers)
        if response.status_code == CorsRefused.status:
            raise CorsRefused(
                f"{bytes(response.body).decode()}. The setting GATEWAY_CORS_ORIGINS lists the "
                "allowed origins.",
                headers={"Vary": response.headers["Vary"]},
            )
        return response


@dataclass
class SecurityHeadersMiddleware:
    """Add headers that forbid browsers to run, frame or sniff a response.

    The page has its own `Content-Security-Policy`.
    """

    app: ASGIApp

    _policy = "default-src 'none'; frame-ancestors 'none'"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers["X-Content-Type-Options"] = "nosniff"
                headers["X-Frame-Options"] = "DENY"
                headers["Referrer-Policy"] = "no-referrer"
                headers.setdefault("Content-Security-Policy", self._policy)
            await send(message)

        await self.app(scope, receive, send_with_headers if scope["type"] == "http" else send)

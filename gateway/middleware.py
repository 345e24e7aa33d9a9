"""What happens to every request: an identity, a log line, security headers, API keys."""

import hashlib
import hmac
import logging
import re
import uuid
from dataclasses import dataclass
from pathlib import Path

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gateway import page
from gateway.context import Context, context_of
from gateway.errors import KINDS, InternalError, Unauthorized, problem
from gateway.metrics import Metrics

log = logging.getLogger("gateway.access")

PROBES = frozenset({"/livez", "/readyz", "/healthz"})
QUIET = PROBES | {"/metrics"}

_SANE_ID = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")
_TRACEPARENT = re.compile(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")


@dataclass
class ContextMiddleware:
    """Gives a request its context, and tells its outcome: headers, metrics, and one log line.

    `X-Request-ID` is taken from the client if it is sane. What no handler caught is logged with
    its traceback here and answered with a 500.
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
        context = Context(given if _SANE_ID.fullmatch(given) else uuid.uuid4().hex)
        traceparent = headers.get("traceparent", "")
        if _TRACEPARENT.fullmatch(traceparent):
            context.trace_headers["traceparent"] = traceparent
        scope.setdefault("state", {})["context"] = context
        status = 0

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                answer = MutableHeaders(scope=message)
                answer["X-Request-ID"] = context.request_id
                answer["Server-Timing"] = context.server_timing()
            await send(message)

        try:
            await self.app(scope, receive, send_with_headers)
        except Exception:
            context.outcome = KINDS[InternalError].slug
            log.exception("unhandled", extra={"request_id": context.request_id})
            if status == 0:
                error = InternalError("This is a bug of the gateway; its log says more.")
                answer = problem(error, context.request_id, self.retry_after_s)
                await answer(scope, receive, send_with_headers)
        finally:
            self._account(scope, context, status)

    def _account(self, scope: Scope, context: Context, status: int) -> None:
        stages = dict(context.stages)  # a thread that nobody waits for may still add to it
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


@dataclass
class SecurityHeadersMiddleware:
    """Headers that keep browsers from doing anything with an answer but reading it.

    The page brings a `Content-Security-Policy` of its own.
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


def read_keys(file: Path) -> list[bytes]:
    """The digests of the API keys in a file: one key a line, `#` begins a comment.

    Raises:
        ValueError: the file holds no key.
    """
    lines = (line.strip() for line in file.read_text().splitlines())
    keys = [line for line in lines if line and not line.startswith("#")]
    if not keys:
        raise ValueError(f"GATEWAY_API_KEYS_FILE: {file} holds no key; put one on each line")
    return [_digest(key) for key in keys]


def _is_open(path: str) -> bool:
    return path in PROBES or path in page.PATHS or path.startswith(page.FOLDERS)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


@dataclass
class ApiKeyMiddleware:
    """Asks for an API key everywhere but at the probes and the page.

    The key comes as `Authorization: Bearer KEY` or `X-API-Key: KEY`. Digests of one length are
    compared, each with all, so that the time tells nothing.
    """

    app: ASGIApp
    keys: list[bytes]
    retry_after_s: int

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http" or _is_open(scope["path"]) or self._knows(Headers(scope=scope)):
            await self.app(scope, receive, send)
            return
        context = context_of(scope)
        context.outcome = KINDS[Unauthorized].slug
        error = Unauthorized(
            "Send a key that is known here, as `Authorization: Bearer KEY` or `X-API-Key: KEY`.",
            headers={"WWW-Authenticate": "Bearer"},
        )
        answer = problem(error, context.request_id, self.retry_after_s)
        await answer(scope, receive, send)

    def _knows(self, headers: Headers) -> bool:
        scheme, _, token = headers.get("authorization", "").partition(" ")
        key = token.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
        digest = _digest(key)
        return any([hmac.compare_digest(digest, known) for known in self.keys])

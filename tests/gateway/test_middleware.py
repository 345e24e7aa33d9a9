"""The middleware alone, without a server."""

import asyncio
import logging

import pytest
from starlette.types import ASGIApp, Receive, Scope, Send

from gateway.admission import Limits
from gateway.cluster import Cluster
from gateway.context import context_of
from gateway.metrics import Metrics
from gateway.middleware import ContextMiddleware

TRACEPARENT = f"00-{'ab' * 16}-{'cd' * 8}-01"


def metrics() -> Metrics:
    return Metrics(Limits(1, 1, 1), Cluster([], "flownet2"))


def serve(app: ASGIApp, *headers: tuple[bytes, bytes]) -> None:
    """Serve a request whose response is not read."""
    scope = {"type": "http", "method": "GET", "path": "/", "headers": list(headers)}

    async def unused(*_: object) -> dict[str, object]:
        raise AssertionError

    asyncio.run(app(scope, unused, unused))


@pytest.mark.parametrize("tracing", [False, True])
def test_triton_and_the_log_get_the_traceparent_alone(
    tracing: bool, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("opentelemetry.sdk")
    from opentelemetry.sdk.trace import TracerProvider  # noqa: PLC0415

    from gateway.tracing import TracingMiddleware  # noqa: PLC0415

    for_triton: dict[str, str] = {}

    async def inner(scope: Scope, _receive: Receive, _send: Send) -> None:
        for_triton.update(context_of(scope).trace_headers)

    app = TracingMiddleware(inner, TracerProvider()) if tracing else inner
    caplog.set_level(logging.DEBUG, "gateway.access")
    serve(
        ContextMiddleware(app, metrics(), 1),
        (b"traceparent", TRACEPARENT.encode()),
        (b"tracestate", b"key=" + b"v" * 200),
        (b"baggage", b"secret=" + b"x" * 4000),
    )
    assert for_triton.keys() == {"traceparent"}
    assert for_triton["traceparent"].split("-")[1] == "ab" * 16
    (record,) = caplog.records
    assert vars(record)["traceparent"] == for_triton["traceparent"]
    assert not {"baggage", "tracestate"} & vars(record).keys()

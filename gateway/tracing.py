"""OpenTelemetry traces, where a collector is configured (the `otel` extra).

One span for a request, with its stages as attributes; its `traceparent` goes to Triton, whose spans
become its children. Nothing else of W3C's headers passes: `baggage` and `tracestate` are as long as
a client likes. Without a collector a client's own `traceparent` goes to Triton as it came.
"""

from dataclasses import dataclass

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import SpanKind
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from starlette.types import ASGIApp, Receive, Scope, Send

import flownet2
from gateway.context import context_of

PROPAGATOR = TraceContextTextMapPropagator()


def provider(endpoint: str) -> TracerProvider:
    """A provider that sends spans to an OTLP collector (base URL, without /v1/traces)."""
    resource = Resource.create(
        {"service.name": "flownet2-gateway", "service.version": flownet2.__version__}
    )
    tracers = TracerProvider(resource=resource)
    exporter = OTLPSpanExporter(endpoint=f"{endpoint.rstrip('/')}/v1/traces")
    tracers.add_span_processor(BatchSpanProcessor(exporter))
    return tracers


@dataclass
class TracingMiddleware:
    """Wraps a request in a span, child of the client's, and leaves its context for Triton.

    At the end of the application it sends the spans that it still has.
    """

    app: ASGIApp
    provider: TracerProvider

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":  # the life of the application
            await self.app(scope, receive, send)
            self.provider.shutdown()
            return
        context = context_of(scope)
        with self.provider.get_tracer("gateway").start_as_current_span(
            scope["method"],
            PROPAGATOR.extract(context.trace_headers),
            SpanKind.SERVER,
            {"http.request.method": scope["method"], "url.path": scope["path"]},
        ) as span:
            PROPAGATOR.inject(context.trace_headers)
            try:
                await self.app(scope, receive, send)
            finally:
                if route := scope.get("route"):
                    span.update_name(f"{scope['method']} {route.path}")
                span.set_attribute("flownet2.outcome", context.outcome)
                span.set_attribute("flownet2.request_id", context.request_id)
                for stage, seconds in dict(context.stages).items():
                    span.set_attribute(f"flownet2.stage.{stage}_ms", round(seconds * 1e3, 2))

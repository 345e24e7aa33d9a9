"""OpenTelemetry traces, if a collector is configured (the `otel` extra).

Each request is a span, with its stages as attributes. Its `traceparent` is passed to Triton, whose
spans become children. W3C's other headers, `baggage` and `tracestate`, are dropped, since clients
choose their length. Without a collector a client's own `traceparent` is passed to Triton unchanged.
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
    """Return a provider that sends spans to an OTLP collector.

    Args:
        endpoint: base URL of the collector, without /v1/traces.
    """
    resource = Resource.create(
        {"service.name": "flownet2-gateway", "service.version": flownet2.__version__}
    )
    tracers = TracerProvider(resource=resource)
    exporter = OTLPSpanExporter(endpoint=f"{endpoint.rstrip('/')}/v1/traces")
    tracers.add_span_processor(BatchSpanProcessor(exporter))
    return tracers


@dataclass
class TracingMiddleware:
    """Wrap each request in a span, a child of the client's, and pass its context to Triton.

    Spans that are left at the end of the application are sent then.
    """

    app: ASGIApp
    provider: TracerProvider

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":  # lifespan: returns when the application ends
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

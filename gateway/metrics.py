"""Prometheus metrics of one gateway."""

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    GCCollector,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4 as CONTENT_TYPE

from gateway.admission import Limits
from gateway.inference import Cluster

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
BYTES = tuple(4.0**power for power in range(5, 14))
PIXELS = tuple(4.0**power for power in range(4, 14))


class Metrics:
    """The metrics and their registry."""

    def __init__(self, limits: Limits, cluster: Cluster) -> None:
        registry = self.registry = CollectorRegistry()
        for collector in (ProcessCollector, PlatformCollector, GCCollector):
            collector(registry=registry)
        self.requests = Counter(
            "flownet2_requests_total",
            "Requests by outcome: `ok`, or the last part of the problem's type",
            ["path", "outcome"],
            registry=registry,
        )
        self.rejected = Counter(
            "flownet2_rejected_total",
            "Requests for flow refused because of load",
            ["reason"],
            registry=registry,
        )
        self.seconds = Histogram(
            "flownet2_request_seconds",
            "Time from the request's head to the end of its response",
            ["path"],
            buckets=SECONDS,
            registry=registry,
        )
        self.stages = Histogram(
            "flownet2_stage_seconds",
            "Time of one stage of a request for flow",
            ["stage"],
            buckets=SECONDS,
            registry=registry,
        )
        self.body_bytes = Histogram(
            "flownet2_body_bytes", "Bytes of a body", buckets=BYTES, registry=registry
        )
        self.image_pixels = Histogram(
            "flownet2_image_pixels",
            "Pixels of one of a pair's images",
            buckets=PIXELS,
            registry=registry,
        )
        self.response_bytes = Histogram(
            "flownet2_response_bytes", "Bytes of a flow as sent", buckets=BYTES, registry=registry
        )
        for name, meaning, value in (
            (
                "admitted",
                "Requests for flow that are in",
                lambda: limits.requests.size - limits.requests.free,
            ),
            (
                "slots_used",
                "Slots held by requests in flight",
                lambda: limits.slots.size - limits.slots.free,
            ),
            ("slots", "Slots there are", lambda: limits.slots.size),
            (
                "endpoints_serving",
                "Tritons that serve a model",
                lambda: sum(bool(endpoint.models) for endpoint in cluster.endpoints),
            ),
        ):
            Gauge(f"flownet2_{name}", meaning, registry=registry).set_function(value)

    def exposition(self) -> bytes:
        """All metrics in Prometheus' text format (`CONTENT_TYPE`)."""
        return generate_latest(self.registry)


__all__ = ["CONTENT_TYPE", "Metrics"]

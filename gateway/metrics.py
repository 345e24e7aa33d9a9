"""Prometheus metrics of a gateway."""

import asyncio
import os
import resource
from pathlib import Path
from typing import Literal

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
from prometheus_client.multiprocess import MultiProcessCollector

from flownet2.models import Model
from gateway.admission import Limits
from gateway.cluster import Cluster

SHARED_FOLDER = "PROMETHEUS_MULTIPROC_DIR"
"""Environment variable of prometheus_client: the folder in which several processes count together.
It must be set before this module is imported."""

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
BYTES = tuple(4.0**power for power in range(5, 14))
PIXELS = tuple(4.0**power for power in range(4, 14))


class Metrics:
    """The metrics and their registry."""

    def __init__(self, limits: Limits, cluster: Cluster) -> None:
        registry = self.registry = CollectorRegistry()
        if SHARED_FOLDER not in os.environ:
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
            "Requests for flow rejected because of load",
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
            "Pixels of each image of a pair",
            buckets=PIXELS,
            registry=registry,
        )
        self.response_bytes = Histogram(
            "flownet2_response_bytes", "Bytes of a flow as sent", buckets=BYTES, registry=registry
        )

        def gauge(name: str, meaning: str, mode: Literal["livesum", "livemax"]) -> Gauge:
            return Gauge(name, meaning, registry=registry, multiprocess_mode=mode)

        self._limits, self._cluster = limits, cluster
        self._admitted = gauge("flownet2_admitted", "Requests for flow admitted now", "livesum")
        self._slots_used = gauge(
            "flownet2_slots_used", "Slots held by requests in flight", "livesum"
        )
        self._slots = gauge("flownet2_slots", "All slots", "livesum")
        self._models = Gauge(
            "flownet2_model_served",
            "1 for each model that is served, with its network, licence and pixel limit",
            ["model", "version", "network", "weights_license", "max_pixels"],
            registry=registry,
            multiprocess_mode="livemax",
        )
        self._known_models: set[Model] = set()
        self._endpoints = gauge(
            "flownet2_endpoints_serving", "Tritons that serve at least one model", "livemax"
        )

        # In place of ProcessCollector's metric, which is that of one process.
        self._memory: Gauge | None = None
        if SHARED_FOLDER in os.environ:
            self._memory = gauge("process_resident_memory_bytes", "Resident memory", "livesum")

    async def keep_current(self) -> None:
        """Set the gauges every second until cancelled, for scrapes that other processes answer."""
        while True:
            self._set_gauges()
            await asyncio.sleep(1)

    def _set_gauges(self) -> None:
        limits = self._limits
        self._admitted.set(limits.requests.size - limits.requests.free)
        self._slots_used.set(limits.slots.size - limits.slots.free)
        self._slots.set(limits.slots.size)
        if self._memory:
            pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[1]
            self._memory.set(int(pages) * resource.getpagesize())
        served = set(self._cluster.models().values())
        self._known_models |= served
        for model in self._known_models:
            self._models.labels(
                model.name,
                model.version,
                model.network or "",
                model.weights_license or "",
                "" if model.max_pixels is None else model.max_pixels,
            ).set(model in served)
        self._endpoints.set(sum(bool(endpoint.models) for endpoint in self._cluster.endpoints))

    def exposition(self) -> bytes:
        """Return the metrics of all processes together in Prometheus' text format."""
        self._set_gauges()
        if SHARED_FOLDER not in os.environ:
            return generate_latest(self.registry)
        shared = CollectorRegistry()
        MultiProcessCollector(shared)  # type: ignore[no-untyped-call]
        return generate_latest(shared)


__all__ = ["CONTENT_TYPE", "Metrics"]

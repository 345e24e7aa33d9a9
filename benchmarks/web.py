"""The gateway under load, and beside it the plain web layer, in front of the same Triton."""

import base64
import contextlib
import json
import os
import re
import statistics
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import httpx

from benchmarks.report import milliseconds, table
from benchmarks.samples import sample_folders
from launch import gateway
from launch.child import Child
from launch.ports import free_ports
from launch.triton import Address

CONCURRENCIES = (1, 2, 4, 8)


@dataclass(frozen=True)
class Measurement:
    """What clients saw of a service: pairs a second, and seconds of each request."""

    pairs_per_second: float
    latencies: list[float]
    own_times: list[float]  # the service's time without Triton's


def compare(triton: Address, seconds: float) -> str:
    """Load both services, one after the other at each concurrency; two Markdown tables.

    Args:
        triton: serves the shipped weights as ``flownet2``.
        seconds: length of a measurement.
    """
    body = request_body()
    rows, own = [], {}
    with gateway_on_one_core(triton) as ours, plain_web_layer(triton) as plain:
        services = {"gateway": ours, "plain web layer": plain}
        for concurrency in CONCURRENCIES:
            for name, url in services.items():
                measured = load(url, body, concurrency, seconds)
                rows.append(
                    (
                        f"{name}, {concurrency}",
                        f"{measured.pairs_per_second:.2f}",
                        milliseconds(statistics.median(measured.latencies)),
                        milliseconds(percentile(measured.latencies, 95)),
                    )
                )
                if concurrency == 1:
                    own[name] = statistics.median(measured.own_times)
    return "\n".join(
        (
            table(("service, clients", "pairs/s", "p50 ms", "p95 ms"), rows),
            table(
                ("a request without Triton's time, one client", "p50 ms", "of the plain layer"),
                [
                    (name, milliseconds(time), f"{time / own['plain web layer']:.2f}")
                    for name, time in own.items()
                ],
            ),
        )
    )


def request_body() -> bytes:
    """The JSON request for the first sample pair."""
    folder = sample_folders()[0]
    files = [(folder / f"frame{index}.png").read_bytes() for index in (0, 1)]
    return json.dumps(
        {
            f"image{index}_base64": base64.b64encode(file).decode()
            for index, file in enumerate(files, 1)
        }
    ).encode()


def load(url: str, body: bytes, clients: int, seconds: float) -> Measurement:
    """Post a request again and again from several clients, each waiting for its answer."""
    latencies: list[float] = []
    own_times: list[float] = []
    end = threading.Event()

    def client() -> None:
        with httpx.Client(timeout=120) as session:
            while not end.is_set():
                start = time.perf_counter()
                answer = session.post(
                    f"{url}/estimate_flow/",
                    content=body,
                    headers={"Content-Type": "application/json", "Accept-Encoding": "identity"},
                )
                answer.raise_for_status()
                latencies.append(time.perf_counter() - start)
                stages = dict(re.findall(r"(\w+);dur=([\d.]+)", answer.headers["Server-Timing"]))
                own_times.append((float(stages["total"]) - float(stages["infer"])) / 1e3)

    start = time.perf_counter()
    with ThreadPoolExecutor(clients) as threads:
        running = [threads.submit(client) for _ in range(clients)]
        time.sleep(seconds)
        end.set()
        for one in running:
            one.result()
    return Measurement(len(latencies) / (time.perf_counter() - start), latencies, own_times)


def percentile(values: list[float], percent: int) -> float:
    """The value that so many percent of the values do not exceed."""
    return sorted(values)[max(0, -(-len(values) * percent // 100) - 1)]


@contextlib.contextmanager
def gateway_on_one_core(triton: Address) -> Iterator[str]:
    """URL of the gateway, held to one core."""
    (port,) = free_ports(1)
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(cores)})  # what a child inherits
    try:
        with gateway.serve(triton, port):
            os.sched_setaffinity(0, cores)
            yield f"http://127.0.0.1:{port}"
    finally:
        os.sched_setaffinity(0, cores)


@contextlib.contextmanager
def plain_web_layer(triton: Address) -> Iterator[str]:
    """URL of the plain web layer."""
    (port,) = free_ports(1)
    child = Child(
        "plain web layer",
        [sys.executable, "-m", "benchmarks.plain_web", triton.grpc, str(port)],
        os.environ,
        lambda line: None,
    )
    try:
        child.wait_until(lambda: listens(port), 60, threading.Event())
        yield f"http://127.0.0.1:{port}"
    finally:
        child.stop(10)


def listens(port: int) -> bool:
    """True when a local server accepts connections."""
    with contextlib.suppress(httpx.TransportError):
        httpx.get(f"http://127.0.0.1:{port}/")
        return True
    return False

"""`python -m benchmarks.web [FRAME FRAME]`: the gateway alone, with a model that takes no time.

For comparison, a plain web layer (`benchmarks.plain_web`) in front of the same model.
"""

import argparse
import base64
import contextlib
import http.client
import io
import json
import os
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import psutil
from PIL import Image

from benchmarks.report import milliseconds, table
from benchmarks.samples import sample_folders
from flownet2.contract import IMAGE_INPUTS
from launch import gateway
from launch.check import answers_ok
from launch.child import Child
from launch.ports import free_ports
from launch.triton import Address

SIZE = (1024, 436)  # width and height of MPI-Sintel's frames
CLIENTS = (1, 2, 8)
PROCESSES = (1, 2)


@dataclass(frozen=True)
class Request:
    """A request for flow, and its name in the table."""

    name: str
    path: str
    headers: Mapping[str, str]
    body: bytes


@dataclass(frozen=True)
class Service:
    """A running web layer."""

    port: int
    process: psutil.Process

    def cpu(self) -> float:
        """Return the CPU time that its processes have used so far, in seconds."""
        family = (self.process, *self.process.children(recursive=True))
        return sum(sum(process.cpu_times()[:2]) for process in family)


def compare(seconds: float, frames: Sequence[bytes] | None = None) -> str:
    """Measure the gateway and the plain web layer, and return a Markdown table.

    Args:
        seconds: length of each measurement.
        frames: two PNG files; by default a sample pair enlarged to the size of MPI-Sintel.
    """
    pngs = frames or sample_frames()
    every = requests(pngs)
    rows = []
    with instant_triton() as triton:
        for processes in PROCESSES:
            with gateway_of(triton, processes) as service:
                for request in every:
                    measured = measure(service, request, seconds)
                    rows.append((f"gateway, {processes}: {request.name}", *measured))
        with plain_web_layer(triton) as service:
            rows.append(
                ("plain web layer: JSON of PNGs, JSON", *measure(service, every[0], seconds))
            )
    head = ("service, processes: input, output", "CPU ms/request")
    return table(
        (*head, *(f"pairs/s, clients: {clients}" for clients in CLIENTS)),
        rows,
    )


def measure(service: Service, request: Request, seconds: float) -> Iterator[str]:
    """Return CPU milliseconds per request, and pairs per second for each of `CLIENTS`."""
    load(service.port, request, 1, seconds / 4)  # warm-up
    rates = []
    before, answered = service.cpu(), 0
    for clients in CLIENTS:
        start = time.perf_counter()
        count = load(service.port, request, clients, seconds)
        rates.append(count / (time.perf_counter() - start))
        answered += count
    yield milliseconds((service.cpu() - before) / answered)
    yield from (f"{rate:.1f}" for rate in rates)


def sample_frames() -> list[bytes]:
    """Return the first sample pair at the size of MPI-Sintel, as PNG files."""
    files = (sample_folders()[0] / f"frame{index}.png" for index in (0, 1))
    return [
        encode(Image.open(file).resize(SIZE, Image.Resampling.BICUBIC), "PNG") for file in files
    ]


def encode(image: Image.Image, format: str) -> bytes:
    """Return an image as a file."""
    file = io.BytesIO()
    image.convert("RGB").save(file, format, quality=95)
    return file.getvalue()


def requests(pngs: Sequence[bytes]) -> list[Request]:
    """Return the requests: JSON in and out, then other inputs and other outputs."""
    jpegs = [encode(Image.open(io.BytesIO(png)), "JPEG") for png in pngs]
    native = "/estimate_flow/?size=native"
    as_json, as_npy, as_png = (
        {"Accept": name} for name in ("application/json", "application/x-npy", "image/png")
    )
    boundary, form = form_of(pngs)
    multipart = {"Content-Type": f"multipart/form-data; boundary={boundary}"}
    return [
        Request("JSON of PNGs, JSON", "/estimate_flow/", as_json, json_of(pngs)),
        Request("JSON of JPEGs, JSON", "/estimate_flow/", as_json, json_of(jpegs)),
        Request("JSON of PNGs, .npy native", native, as_npy, json_of(pngs)),
        Request("files of PNG, .npy native", native, as_npy | multipart, form),
        Request("JSON of PNGs, picture native", native, as_png, json_of(pngs)),
    ]


def json_of(files: Sequence[bytes]) -> bytes:
    """Return the JSON body with two images."""
    fields = {f"image{i}_base64": base64.b64encode(x).decode() for i, x in enumerate(files, 1)}
    return json.dumps(fields).encode()


def form_of(files: Sequence[bytes]) -> tuple[str, bytes]:
    """Return the boundary and the content of a multipart form with two images."""
    boundary = uuid.uuid4().hex
    parts = []
    for name, file in zip(IMAGE_INPUTS, files, strict=True):
        head = f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"; filename="a"\r\n'
        parts += [head.encode(), b"\r\n", file, b"\r\n"]
    return boundary, b"".join(parts) + f"--{boundary}--\r\n".encode()


def load(port: int, request: Request, clients: int, seconds: float) -> int:
    """Post a request repeatedly from several clients, and return the number of responses.

    Each client waits for the response before it posts again.
    """
    end = time.perf_counter() + seconds

    def client() -> int:
        count = 0
        line = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
        with contextlib.closing(line):
            while count == 0 or time.perf_counter() < end:
                line.request("POST", request.path, request.body, dict(request.headers))
                response = line.getresponse()
                content = response.read()
                if response.status != http.HTTPStatus.OK:
                    raise RuntimeError(content[:200].decode(errors="replace"))
                count += 1
        return count

    with ThreadPoolExecutor(clients) as threads:
        return sum(result.result() for result in [threads.submit(client) for _ in range(clients)])


@contextlib.contextmanager
def instant_triton() -> Iterator[Address]:
    """Run a stand-in for Triton whose model takes no time."""
    (port,) = free_ports(1)
    with running("instant model", ["benchmarks.instant", str(port)], port):
        yield Address("127.0.0.1", port, port, port)


@contextlib.contextmanager
def gateway_of(triton: Address, processes: int) -> Iterator[Service]:
    """Run the gateway."""
    (port,) = free_ports(1)
    settings = {"GATEWAY_PROCESSES": str(processes), "GATEWAY_LOG_LEVEL": "WARNING"}
    with gateway.serve(triton, port, settings=settings) as child:
        while not answers_ok("127.0.0.1", port, "/readyz"):
            time.sleep(0.1)
        yield Service(port, psutil.Process(child.pid))


@contextlib.contextmanager
def plain_web_layer(triton: Address) -> Iterator[Service]:
    """Run the plain web layer."""
    (port,) = free_ports(1)
    command = ["benchmarks.plain_web", triton.grpc, str(port)]
    with running("plain web layer", command, port) as child:
        yield Service(port, psutil.Process(child.pid))


@contextlib.contextmanager
def running(name: str, module: list[str], port: int) -> Iterator[Child]:
    """Run a module of this project as a child process that listens on a port."""
    child = Child(name, [sys.executable, "-m", *module], os.environ, lambda line: None)
    try:
        child.wait_until(lambda: listens(port), 60, threading.Event())
        yield child
    finally:
        child.stop(10)


def listens(port: int) -> bool:
    """Return True if a local server accepts connections."""
    with (
        contextlib.suppress(OSError),
        contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=5)) as line,
    ):
        line.connect()
        return True
    return False


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.web", description=__doc__)
    parser.add_argument("frames", nargs="*", type=Path, help="two PNG files of one size")
    parser.add_argument("--seconds", type=float, default=8.0, help="length of a measurement")
    options = parser.parse_args()
    frames = [frame.read_bytes() for frame in options.frames]
    print(compare(options.seconds, frames or None), end="")


if __name__ == "__main__":
    main()

"""`make soak`: chaos test with many clients against two Tritons.

Meanwhile processes are killed and /dev/shm fills up. Every request must return the correct flow, or
a 503 with Retry-After; while no gateway runs, it may find no connection. At the end both Tritons
must have recovered. Prints the events, the outcomes of the requests, and memory before and after.

``/dev/shm`` is filled only if it is small: `make soak` mounts one of its own.
"""

import argparse
import asyncio
import contextlib
import io
import itertools
import os
import shutil
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import httpx2
import numpy as np
import numpy.typing as npt
import psutil
from PIL import Image

from benchmarks.report import bypass_proxies, machine, table
from flownet2.contract import IMAGE_INPUTS
from launch import gateway, triton, wheel
from launch.check import HealthCheck
from launch.child import Child
from launch.ports import free_ports
from launch.shared_memory import FOLDER
from launch.supervisor import Fault, Start, Supervisor

PAIRS = 4
SIZE = (640, 480)
BEGIN = time.monotonic()
TOLERANCE_PX = 1e-3
"""Largest mean difference of a correct flow from that of an idle server."""
SMALL_BYTES = 2**30
RECOVERY_SECONDS = 60.0

RIGHT, REFUSED, AWAY = "correct flow", "503 with Retry-After", "no connection, no gateway running"


class Server:
    """A supervised server and its current process."""

    def __init__(self, name: str, start: Start, fault: Fault) -> None:
        self.name = name
        self.child: Child | None = None
        self.up = False
        self._start = start
        self.supervisor = Supervisor(self._started, fault, lambda line: say(f"{name}: {line}"))

    @contextlib.contextmanager
    def _started(self, stop: threading.Event) -> Iterator[Child]:
        with self._start(stop) as self.child:
            self.up = True
            say(f"{self.name}: ready")
            yield self.child
        self.child = None

    async def pid(self) -> int:
        """Wait for a process and return its id."""
        while not self.child:
            await asyncio.sleep(0.1)
        return self.child.pid


def main() -> int:
    """Run the test; return 1 if a request had another outcome, or a Triton did not recover."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak", description=__doc__)
    parser.add_argument("--repository", type=Path, default=Path("model_repository"))
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=60.0)
    options = parser.parse_args()
    bypass_proxies()
    print(machine())
    addresses = [triton.local_address() for _ in range(2)]
    (port,) = free_ports(1)
    endpoints = ",".join(address.grpc for address in addresses)

    def start_triton(address: triton.Address) -> Start:
        @contextlib.contextmanager
        def start(stop: threading.Event) -> Iterator[Child]:
            with wheel.serve(options.repository, address=address, stop=stop) as server:
                yield server.child

        return start

    tritons = [
        Server(f"Triton {index}", start_triton(at), HealthCheck(at.host, at.http_port).fault)
        for index, at in enumerate(addresses, 1)
    ]
    service = Server(
        "gateway",
        lambda stop: gateway.serve(
            addresses[0], port, stop=stop, settings={"TRITON_ENDPOINTS": endpoints}
        ),
        lambda: gateway.fault(addresses[0].host, port),
    )
    with contextlib.ExitStack() as servers:
        for server in (*tritons, service):
            servers.enter_context(server.supervisor)
            while not server.supervisor.ready():
                time.sleep(0.1)
        before = memory(service)
        url = f"http://127.0.0.1:{port}"
        outcomes = asyncio.run(soak(url, options.clients, options.seconds, tritons, service))
        faults = asyncio.run(wait_for_both(url, addresses))
        after = memory(service)
    print(table(["requests ended in", ""], [[name, str(n)] for name, n in outcomes.most_common()]))
    print(table(["MiB", "gateway", str(FOLDER)], [["before", *before], ["after", *after]]))
    wrong = [name for name in outcomes if name not in (RIGHT, REFUSED, AWAY)]
    for fault in [*(f"requests ended in {name}" for name in wrong), *faults]:
        print(f"error: {fault}")
    return 1 if wrong or faults or not outcomes[RIGHT] else 0


def say(line: str) -> None:
    """Print an event with its time."""
    print(f"{time.monotonic() - BEGIN:6.1f} s  {line}", flush=True)


async def soak(
    url: str, clients: int, seconds: float, tritons: list[Server], service: Server
) -> Counter[str]:
    """Send requests while faults are injected, and count their outcomes."""
    pairs = [request(seed) for seed in range(PAIRS)]
    limits = httpx2.Limits(
        max_keepalive_connections=0
    )  # the gateway restarts and closes idle connections
    async with httpx2.AsyncClient(base_url=url, timeout=150, limits=limits) as client:
        expected = [read_flow(await post(client, pair)) for pair in pairs]
        outcomes: Counter[str] = Counter()
        turns = itertools.cycle(range(PAIRS))
        end = time.monotonic() + seconds

        async def one_client() -> None:
            while time.monotonic() < end:
                turn = next(turns)
                try:
                    response = await post(client, pairs[turn])
                except httpx2.TransportError as error:
                    away = isinstance(error, httpx2.ConnectError) and not service.up
                    outcomes[AWAY if away else repr(error)] += 1
                    await asyncio.sleep(0.2)
                else:
                    outcomes[outcome(response, expected[turn])] += 1
                    await asyncio.sleep(float(response.headers.get("retry-after", 0)))

        async with asyncio.TaskGroup() as tasks:
            for _ in range(clients):
                tasks.create_task(one_client())
            tasks.create_task(inject_faults(seconds / 10, tritons, service))
    return outcomes


async def inject_faults(step: float, tritons: list[Server], service: Server) -> None:
    """Kill, stop and restart processes and fill /dev/shm, in nine steps."""
    first, second = tritons
    await asyncio.sleep(step)
    say(f"SIGKILL to {first.name}")
    os.kill(await first.pid(), signal.SIGKILL)
    await asyncio.sleep(2 * step)
    say(f"SIGKILL to the stub of {second.name}")
    psutil.Process(await second.pid()).children()[0].kill()
    await asyncio.sleep(2 * step)
    say(f"SIGSTOP to {first.name}")
    stopped = await first.pid()
    os.kill(stopped, signal.SIGSTOP)
    await asyncio.sleep(step)
    say(f"SIGCONT to {first.name}")
    os.kill(stopped, signal.SIGCONT)
    await asyncio.sleep(step)
    say("SIGTERM to the gateway")
    service.up = False
    os.kill(await service.pid(), signal.SIGTERM)
    await asyncio.sleep(step)
    if shutil.disk_usage(FOLDER).total > SMALL_BYTES:
        say(f"{FOLDER} is not filled: it is too large to be a test's own")
        return
    say(f"{FOLDER} is full except for 1 MiB")
    ballast = FOLDER / "ballast"
    with ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(bytes(2**20)):
            pass
    os.truncate(ballast, max(0, ballast.stat().st_size - 2**20))
    await asyncio.sleep(step)
    ballast.unlink()
    say(f"{FOLDER} has room again")


async def wait_for_both(url: str, addresses: list[triton.Address]) -> list[str]:
    """Wait until both Tritons serve and the gateway uses them, and return what is still wrong."""
    end = time.monotonic() + RECOVERY_SECONDS
    faults = ["not checked"]
    async with httpx2.AsyncClient(base_url=url) as client:
        while faults and time.monotonic() < end:
            await asyncio.sleep(0.5)
            faults = []
            for address in addresses:
                try:
                    fault = HealthCheck(address.host, address.http_port).fault()
                except OSError as error:
                    fault = str(error)
                faults += [fault] if fault else []
            try:
                metrics = (await client.get("/metrics")).text
            except httpx2.TransportError as error:
                metrics = repr(error)
            if "flownet2_endpoints_serving 2.0" not in metrics:
                faults.append("the gateway does not use both Tritons")
    return faults


def outcome(response: httpx2.Response, expected: npt.NDArray[np.float32]) -> str:
    """Return the outcome of a request."""
    if response.status_code == httpx2.codes.OK:
        distance = np.linalg.norm(read_flow(response) - expected, axis=2).mean()
        return RIGHT if distance <= TOLERANCE_PX else "a wrong flow"
    if (
        response.status_code == httpx2.codes.SERVICE_UNAVAILABLE
        and "retry-after" in response.headers
    ):
        return REFUSED
    return f"{response.status_code} {response.text[:100]}"


async def post(client: httpx2.AsyncClient, pair: dict[str, bytes]) -> httpx2.Response:
    """Request the flow of a pair."""
    headers = {"Accept": "application/x-npy", "X-Request-Timeout": "120"}
    return await client.post("/estimate_flow/", files=pair, headers=headers)


def read_flow(response: httpx2.Response) -> npt.NDArray[np.float32]:
    """Return the flow in a response, float32 [512, 512, 2]."""
    response.raise_for_status()
    flow: npt.NDArray[np.float32] = np.load(io.BytesIO(response.content), allow_pickle=False)
    return flow


def request(seed: int) -> dict[str, bytes]:
    """Return the files of a pair: smooth noise, and the same noise shifted by three pixels."""
    noise = np.random.default_rng(seed).integers(0, 256, (48, 64, 3), np.uint8)
    image = Image.fromarray(noise).resize(SIZE, Image.Resampling.BICUBIC)
    moved = image.transform(SIZE, Image.Transform.AFFINE, (1, 0, 3, 0, 1, 0))
    files = {}
    for name, frame in zip(IMAGE_INPUTS, (image, moved), strict=True):
        file = io.BytesIO()
        frame.save(file, "PNG")
        files[name] = file.getvalue()
    return files


def memory(service: Server) -> tuple[str, str]:
    """Return the MiB of memory that the gateway holds, and the MiB used in /dev/shm."""
    while not service.child:  # it may answer before it counts as ready
        time.sleep(0.1)
    parent = psutil.Process(service.child.pid)
    resident = sum(p.memory_info().rss for p in (parent, *parent.children(recursive=True)))
    return f"{resident / 2**20:.0f}", f"{shutil.disk_usage(FOLDER).used / 2**20:.0f}"


if __name__ == "__main__":
    sys.exit(main())

"""Tritons come and go behind one name, as those of a headless service do, and nothing is lost."""

import asyncio
import contextlib
import io
import itertools
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import httpx2
import numpy as np
import pytest

from launch import triton, wheel
from launch.ports import free_ports
from tests.support.gateway_stack import encoded, picture, run_gateway, wait_until

CLIENTS = 32
NAME = "triton.flownet2.svc"


def test_no_request_is_lost_when_tritons_come_and_go(
    closed_form_repository: Path, tmp_path: Path
) -> None:
    # Looks names up in a file, for one process and without root.
    wrapper = next(Path("/usr/lib").glob("*/libnss_wrapper.so"), None)
    if wrapper is None:
        pytest.skip("nss_wrapper is not installed (apt-get install libnss-wrapper)")
    (grpc,) = free_ports(1)
    hosts, fresh = tmp_path / "hosts", tmp_path / "hosts.new"
    changes = itertools.count(1)

    def resolve(*addresses: str) -> None:
        """Let the name stand for these addresses."""
        fresh.write_text("".join(f"{address} {NAME}\n" for address in addresses))
        # nss_wrapper reads a file again whose time of change differs in whole seconds.
        os.utime(fresh, (next(changes),) * 2)
        fresh.replace(hosts)

    def start(stack: contextlib.ExitStack, host: str) -> triton.Triton:
        http, metrics = free_ports(2)
        address = triton.Address(host, http, grpc, metrics)
        return stack.enter_context(wheel.serve(closed_form_repository, address=address))

    first, second, third = (contextlib.ExitStack() for _ in range(3))

    def scale() -> None:
        start(second, "127.0.0.2")
        resolve("127.0.0.1", "127.0.0.2")  # up
        start(third, "127.0.0.3")
        resolve("127.0.0.1", "127.0.0.2", "127.0.0.3")
        wait_until(lambda: serving(gateway.url) == 3)
        resolve("127.0.0.2", "127.0.0.3")  # down, with the time that a pod gives gateways
        wait_until(lambda: serving(gateway.url) == 2)
        first.close()
        second.close()  # while the name still stands for it, as in a name server's cache
        resolve("127.0.0.3")
        wait_until(lambda: serving(gateway.url) == 1)

    with first, second, third:
        resolve("127.0.0.1")
        start(first, "127.0.0.1")
        environment = {"LD_PRELOAD": str(wrapper), "NSS_WRAPPER_HOSTS": str(hosts)}
        with run_gateway(f"{NAME}:{grpc}", tmp_path / "log", **environment) as gateway:
            wait_until(lambda: gateway.get("/readyz") == 200)
            counted = asyncio.run(ask_while(gateway.url, scale))
    print(dict(counted))
    assert counted.keys() == {"right"}
    assert counted["right"] > 10 * CLIENTS


def serving(url: str) -> int:
    """Return the number of Tritons that the gateway knows if all of them serve, else 0."""
    endpoints = httpx2.get(f"{url}/healthz", timeout=30).json()["triton"]
    return len(endpoints) if all(endpoint["models"] for endpoint in endpoints) else 0


async def ask_while(url: str, work: Callable[[], None]) -> Counter[str]:
    """Return the outcomes of requests that many clients make while `work` runs."""
    pairs = [[picture(2 * seed), picture(2 * seed + 1)] for seed in range(CLIENTS)]
    counted: Counter[str] = Counter()
    done = asyncio.Event()

    async def ask(client: httpx2.AsyncClient, seed: int) -> None:
        files = {f"image{i}": encoded(image) for i, image in enumerate(pairs[seed], 1)}
        first, second = (np.asarray(image, np.float32) for image in pairs[seed])
        while not done.is_set():
            response = await client.post("/estimate_flow/?size=native", files=files)
            if response.status_code != 200:
                counted[response.text] += 1
                continue
            flow = np.load(io.BytesIO(response.content))
            counted["right" if np.allclose(flow, (second - first)[..., :2] / 8) else "wrong"] += 1

    headers = {"Accept": "application/x-npy"}
    async with httpx2.AsyncClient(base_url=url, headers=headers, timeout=60) as client:
        asking = [asyncio.create_task(ask(client, seed)) for seed in range(CLIENTS)]
        await asyncio.to_thread(work)
        done.set()
        await asyncio.gather(*asking)
    return counted

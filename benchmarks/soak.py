"""`make soak`: many clients against two Tritons, one of which is killed in the middle.

Every request must end in a right flow, or in a 503 or 504 that says why. Prints how many ended how,
and the memory of the gateway before and after.
"""

import argparse
import asyncio
import contextlib
import io
import itertools
import os
import signal
import sys
import time
from collections import Counter
from pathlib import Path

import httpx
import numpy as np
import numpy.typing as npt
from PIL import Image

from benchmarks.report import bypass_proxies, machine, table
from launch import gateway, triton
from launch.ports import free_ports

PAIRS = 4
SIZE = (640, 480)
TOLERANCE_PX = 0.05
"""Mean distance of a right flow from the one of a quiet server: batches round differently."""

HONEST = (503, 504)


def main() -> int:
    """Run the load; 1 when a request ended in anything but a right flow or an honest refusal."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak", description=__doc__)
    parser.add_argument("--repository", type=Path, default=Path("model_repository"))
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=60.0)
    options = parser.parse_args()
    bypass_proxies()
    print(machine())
    with contextlib.ExitStack() as servers:
        victim = contextlib.ExitStack()
        servers.enter_context(victim)
        stays = servers.enter_context(triton.serve(options.repository)).address
        goes = victim.enter_context(triton.serve(options.repository))
        (port,) = free_ports(1)
        settings = {"TRITON_ENDPOINTS": f"{stays.grpc},{goes.address.grpc}"}
        service = servers.enter_context(gateway.serve(stays, port, settings=settings))
        outcomes, resident = asyncio.run(
            soak(f"http://{stays.host}:{port}", service.pid, options, goes, victim)
        )
    print(table(["outcome", "requests"], [[name, str(n)] for name, n in outcomes.most_common()]))
    print(table(["gateway", "resident MiB"], [[name, f"{mib:.0f}"] for name, mib in resident]))
    wrong = {name for name in outcomes if name != "right flow" and int(name[:3]) not in HONEST}
    if wrong or not outcomes["right flow"]:
        print(f"error: requests ended in {', '.join(sorted(wrong)) or 'refusals alone'}")
        return 1
    return 0


async def soak(
    url: str,
    pid: int,
    options: argparse.Namespace,
    goes: triton.Triton,
    victim: contextlib.ExitStack,
) -> tuple[Counter[str], list[tuple[str, float]]]:
    """Load the service while a Triton is killed after a third of the time and restarted after two.

    Returns:
        How many requests ended how, and the gateway's memory over time.
    """
    pairs = [request(seed) for seed in range(PAIRS)]
    async with httpx.AsyncClient(base_url=url, timeout=150, limits=httpx.Limits()) as client:
        expected = [read_flow(await post(client, pair)) for pair in pairs]
        resident = [("before", resident_mib(pid))]
        outcomes: Counter[str] = Counter()
        turns = itertools.cycle(range(PAIRS))
        end = time.monotonic() + options.seconds
        clients = [
            asyncio.create_task(one_client(client, pairs, expected, turns, outcomes, end))
            for _ in range(options.clients)
        ]
        await asyncio.sleep(options.seconds / 3)
        os.kill(goes.child.pid, signal.SIGKILL)
        await asyncio.sleep(options.seconds / 3)
        resident.append(("under load", resident_mib(pid)))
        await asyncio.to_thread(victim.close)
        restart = triton.serve(options.repository, address=goes.address)
        await asyncio.to_thread(victim.enter_context, restart)
        await asyncio.gather(*clients)
        metrics = (await client.get("/metrics")).text
        assert "flownet2_endpoints_serving 2.0" in metrics, "the restarted Triton is not used"
        resident.append(("after", resident_mib(pid)))
    return outcomes, resident


async def one_client(
    client: httpx.AsyncClient,
    pairs: list[dict[str, bytes]],
    expected: list[npt.NDArray[np.float32]],
    turns: "itertools.cycle[int]",
    outcomes: Counter[str],
    end: float,
) -> None:
    """Post one pair after the other; wait as long as a refusal asks for."""
    while time.monotonic() < end:
        turn = next(turns)
        try:
            answer = await post(client, pairs[turn])
        except httpx.TransportError as error:
            outcomes[f"000 {type(error).__name__}"] += 1
            continue
        if answer.status_code == httpx.codes.OK:
            distance = np.linalg.norm(read_flow(answer) - expected[turn], axis=2).mean()
            outcomes["right flow" if distance <= TOLERANCE_PX else "200 with a wrong flow"] += 1
        else:
            cause = answer.json()["type"].rpartition(":")[2]
            outcomes[f"{answer.status_code} {cause}"] += 1
            await asyncio.sleep(float(answer.headers.get("retry-after", 0)))


async def post(client: httpx.AsyncClient, pair: dict[str, bytes]) -> httpx.Response:
    """Ask for the flow of a pair."""
    return await client.post("/estimate_flow/", files=pair, headers={"Accept": "application/x-npy"})


def read_flow(answer: httpx.Response) -> npt.NDArray[np.float32]:
    """The flow in an answer, float32 [512, 512, 2]."""
    answer.raise_for_status()
    flow: npt.NDArray[np.float32] = np.load(io.BytesIO(answer.content), allow_pickle=False)
    return flow


def request(seed: int) -> dict[str, bytes]:
    """The form of a pair: smooth noise, and the same moved by three pixels."""
    noise = np.random.default_rng(seed).integers(0, 256, (48, 64, 3), np.uint8)
    image = Image.fromarray(noise).resize(SIZE, Image.Resampling.BICUBIC)
    moved = image.transform(SIZE, Image.Transform.AFFINE, (1, 0, 3, 0, 1, 0))
    form = {}
    for name, one in (("image1", image), ("image2", moved)):
        file = io.BytesIO()
        one.save(file, "PNG")
        form[name] = file.getvalue()
    return form


def resident_mib(pid: int) -> float:
    """Resident memory of a process."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


if __name__ == "__main__":
    sys.exit(main())

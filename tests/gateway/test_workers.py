"""Several gateway processes on one port."""

import re
import signal
import threading
from pathlib import Path

import httpx2
import psutil

from launch import triton
from tests.support.gateway_stack import (
    Gateway,
    as_json,
    encoded,
    picture,
    run_gateway,
    wait_until,
)

PATH = "/estimate_flow/"
BODY = as_json(encoded(picture(1)), encoded(picture(2)))


def runs(process: psutil.Process) -> bool:
    """True if a process runs. An orphan that exited may stay a zombie if init does not reap it."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def workers(gateway: Gateway) -> list[psutil.Process]:
    """The processes that serve."""
    children = psutil.Process(gateway.process.pid).children()
    return [x for x in children if runs(x) and "--multiprocessing-fork" in x.cmdline()]


def test_processes_count_together_are_replaced_and_drain(
    closed_form_triton: triton.Triton, tmp_path: Path
) -> None:
    with run_gateway(
        closed_form_triton.address.grpc,
        tmp_path / "log",
        GATEWAY_PROCESSES="2",
        GATEWAY_MAX_IN_FLIGHT="6",
        GATEWAY_SHUTDOWN_DELAY_S="3",
    ) as gateway:

        def metric(text: str) -> bool:
            return f"flownet2_{text}\n" in httpx2.get(f"{gateway.url}/metrics").text

        def metric_value(name: str) -> float:
            text = httpx2.get(f"{gateway.url}/metrics").text
            return float(re.search(rf"^{name} (\S+)$", text, re.M)[1])

        def ready() -> int:
            """Status on a new connection, which any process may accept; 0 if it is refused."""
            try:
                return httpx2.get(f"{gateway.url}/readyz", verify=False).status_code
            except httpx2.TransportError:
                return 0

        def post(model: str = "flownet2") -> int:
            url = f"{gateway.url}{PATH}?model={model}"
            return httpx2.post(url, json=BODY, timeout=60).status_code

        wait_until(lambda: metric("slots 6.0") and metric("endpoints_serving 1.0"))
        assert [post() for _ in range(10)] == [200] * 10
        assert metric('requests_total{outcome="ok",path="/estimate_flow/"} 10.0')

        assert metric_value("process_resident_memory_bytes") > 50e6

        first, second = workers(gateway)
        first.kill()
        wait_until(lambda: len(workers(gateway)) == 2 and first not in workers(gateway))
        assert second in workers(gateway)
        wait_until(lambda: metric("slots 6.0"))
        assert [post() for _ in range(10)] == [200] * 10
        assert metric('requests_total{outcome="ok",path="/estimate_flow/"} 20.0')

        outcomes: list[int] = []
        client = threading.Thread(target=lambda: outcomes.append(post("slow")))
        client.start()
        wait_until(lambda: metric("slots_used 1.0"))
        gateway.process.send_signal(signal.SIGTERM)
        wait_until(lambda: ready() == 503)
        while status := ready():
            assert status == 503
        client.join()
        assert outcomes == [200]
        assert gateway.process.wait(30) == 0
        assert not runs(second)


def test_workers_do_not_outlive_their_parent(tmp_path: Path) -> None:
    def shared() -> set[Path]:
        return set(Path("/dev/shm").glob("gateway-metrics-*"))

    before = shared()
    with run_gateway("127.0.0.1:1", tmp_path / "log", GATEWAY_PROCESSES="2") as gateway:
        both = workers(gateway)
        assert shared() > before
        gateway.process.kill()
        wait_until(lambda: not any(map(runs, both)))
        assert gateway.get("/livez") == 0
    assert shared() == before

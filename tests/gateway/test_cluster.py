"""The client of Triton, against real Tritons: contract, meaning of errors, failure, recovery."""

import asyncio
import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import httpx2
import numpy as np
import psutil
import pytest
from tritonclient.grpc.service_pb2 import ModelInferResponse, ModelStatisticsResponse
from tritonclient.grpc.service_pb2_grpc import add_GRPCInferenceServiceServicer_to_server

from benchmarks.instant import Instant
from gateway.cluster import Cluster
from gateway.endpoint import Endpoint, EndpointLost, check_flow, classify
from gateway.errors import (
    DeadlineExceeded,
    ImageTooLarge,
    InferenceUnavailable,
    ModelFailed,
    QueueFull,
    UnknownModel,
)
from launch import triton, wheel
from tests.support.gateway_stack import (
    as_json,
    encoded,
    expected_flow,
    picture,
    run_gateway,
    wait_until,
    write_model,
)

IMAGE = np.zeros((1, 16, 16, 3), np.uint8)


@pytest.mark.parametrize(
    ("status", "message", "meaning"),
    [
        ("UNAVAILABLE", "[request id: 5] Exceeds maximum queue size", QueueFull),
        ("UNAVAILABLE", "Request timeout expired", DeadlineExceeded),
        ("UNAVAILABLE", "failed to connect to all addresses; last error: …", EndpointLost),
        ("UNAVAILABLE", "Socket closed", EndpointLost),
        ("UNAVAILABLE", "Server is stopping, scheduler for model has stopped …", EndpointLost),
        ("NOT_FOUND", "Request for unknown model: 'a' is not found", EndpointLost),
        ("UNKNOWN", "Stream removed", EndpointLost),
        ("INTERNAL", "Stub process 'a_0' is not healthy.", EndpointLost),
        ("INTERNAL", "Failed to increase the shared memory pool size for key", EndpointLost),
        ("DEADLINE_EXCEEDED", "Deadline Exceeded", DeadlineExceeded),
        ("INTERNAL", "CUDA out of memory", ModelFailed),
        ("INVALID_ARGUMENT", "unexpected shape", ModelFailed),
        (
            "INVALID_ARGUMENT",
            "failed to find any Optimization Profile among [ 0[0] 1[1]] to support the requested …",
            ImageTooLarge,
        ),
        (
            "INVALID_ARGUMENT",
            "request specifies invalid shape for input 'image1' for flownet2_0_gpu0. Error …",
            ImageTooLarge,
        ),
    ],
)
def test_meanings(status: str, message: str, meaning: type[Exception]) -> None:
    assert type(classify(status, message)) is meaning


def infer(address: str, model: str, timeout: float, count: int = 1) -> list[object]:
    """Results or exceptions of `count` simultaneous inferences."""

    async def run() -> list[object]:
        endpoint = Endpoint(address, "flownet2", 8002)
        try:
            calls = [
                endpoint.infer(model, IMAGE, IMAGE, timeout=timeout, request_id="t", headers={})
                for _ in range(count)
            ]
            return list(await asyncio.gather(*calls, return_exceptions=True))
        finally:
            await endpoint.channel.close()

    return asyncio.run(run())


def test_meanings_of_a_real_triton(closed_form_triton: triton.Triton) -> None:
    address = closed_form_triton.address.grpc
    assert isinstance(infer(address, "flownet2", 30)[0], np.ndarray)
    assert type(infer(address, "nosuch", 30)[0]) is EndpointLost
    assert type(infer(address, "raising", 30)[0]) is ModelFailed
    assert type(infer(address, "slow", 0.3)[0]) is DeadlineExceeded
    assert type(infer("127.0.0.1:1", "flownet2", 5)[0]) is EndpointLost
    outcomes = [type(outcome) for outcome in infer(address, "slow", 30, count=6)]
    assert outcomes.count(np.ndarray) >= 1
    assert outcomes.count(QueueFull) >= 2
    assert set(outcomes) == {np.ndarray, QueueFull}


@pytest.mark.parametrize(
    "outputs",
    [
        [],
        [{"name": "flow", "datatype": "FP32", "shape": [1, 4, 5, 3]}],
        [{"name": "flow", "datatype": "FP64", "shape": [1, 4, 5, 2]}],
    ],
)
def test_a_response_without_flow_is_a_failure(outputs: list[dict[str, object]]) -> None:
    with pytest.raises(ModelFailed):
        check_flow(ModelInferResponse(outputs=outputs), 1, 4, 5)


class PartlyBroken(Instant):
    """A Triton with three models; `faults` has the gRPC status of each call that fails."""

    def __init__(self) -> None:
        self.names = ["broken", "flownet2", "other"]
        self.faults: dict[tuple[str, str], grpc.StatusCode] = {}

    def ModelStatistics(self, _request: object, _context: object) -> object:
        return ModelStatisticsResponse(model_stats=[{"name": name} for name in self.names])

    def _call(self, call: str, name: str, request: object, context: grpc.ServicerContext) -> object:
        if fault := self.faults.get((call, name)):
            context.abort(fault, "a fault made on purpose")
        return getattr(super(), call)(request, context)

    def ModelMetadata(self, request: object, context: grpc.ServicerContext) -> object:
        return self._call("ModelMetadata", request.name, request, context)

    def ModelConfig(self, request: object, context: grpc.ServicerContext) -> object:
        return self._call("ModelConfig", request.name, request, context)

    def ModelInfer(self, request: object, context: grpc.ServicerContext) -> object:
        return self._call("ModelInfer", request.model_name, request, context)


@pytest.fixture
def partly_broken() -> Iterator[tuple[PartlyBroken, str]]:
    """The server and its address."""
    servicer = PartlyBroken()
    server = grpc.server(ThreadPoolExecutor(4))
    add_GRPCInferenceServiceServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield servicer, f"127.0.0.1:{port}"
    server.stop(None)


@pytest.mark.parametrize("call", ["ModelMetadata", "ModelConfig"])
@pytest.mark.parametrize("status", [grpc.StatusCode.INTERNAL, grpc.StatusCode.UNAVAILABLE])
def test_a_model_whose_description_fails_does_not_stop_the_others(
    partly_broken: tuple[PartlyBroken, str], call: str, status: grpc.StatusCode
) -> None:
    servicer, address = partly_broken
    servicer.faults[call, "broken"] = status

    async def run() -> None:
        cluster = Cluster([address], "flownet2")
        await cluster.start()
        assert cluster.models().keys() == {"flownet2", "other"}
        assert "broken: " in cluster.endpoints[0].error
        await cluster.close()

    asyncio.run(run())


def test_a_model_that_dies_does_not_stop_the_others(
    partly_broken: tuple[PartlyBroken, str],
) -> None:
    """A model that fails during a request does not stop the others of the same Triton. After it is
    unloaded, it is unknown."""
    servicer, address = partly_broken

    async def infer(cluster: Cluster, model: str) -> None:
        deadline = asyncio.get_running_loop().time() + 30
        await cluster.infer(model, IMAGE, IMAGE, deadline=deadline, request_id="t", headers={})

    async def run() -> None:
        cluster = Cluster([address], "flownet2")
        await cluster.start()
        servicer.faults["ModelInfer", "broken"] = grpc.StatusCode.UNAVAILABLE
        with pytest.raises(InferenceUnavailable):
            await infer(cluster, "broken")
        assert cluster.models().keys() == {"flownet2", "other"}
        await infer(cluster, "other")
        with pytest.raises(InferenceUnavailable):
            cluster.require("broken")
        servicer.names.remove("broken")
        async with asyncio.timeout(20):
            while cluster.endpoints[0].error:
                await asyncio.sleep(0.05)
        with pytest.raises(UnknownModel):
            cluster.require("broken")
        await cluster.close()

    asyncio.run(run())


def test_names_that_do_not_resolve_are_skipped() -> None:
    async def run() -> None:
        cluster = Cluster(["nowhere.invalid:8001", "127.0.0.1:1"], "flownet2")
        await cluster.start()
        assert [endpoint.address for endpoint in cluster.endpoints] == ["127.0.0.1:1"]
        with pytest.raises(InferenceUnavailable):
            cluster.require("flownet2")
        await cluster.close()

    asyncio.run(run())


@pytest.mark.parametrize(
    "host", ["triton", ":8001", "triton:", "triton:0", "triton:65536", "a..b:1", f"{'a' * 64}:1"]
)
def test_invalid_endpoints_are_rejected_at_the_start(host: str) -> None:
    with pytest.raises(ValueError, match=f"TRITON_ENDPOINTS: '{host}' is not host:port"):
        Cluster(["127.0.0.1:8001", host], "flownet2")


def test_a_proxy_is_not_for_triton(
    closed_form_triton: triton.Triton, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "https_proxy", "grpc_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    for name in ("no_proxy", "no_grpc_proxy"):
        monkeypatch.delenv(name, raising=False)
    assert isinstance(infer(closed_form_triton.address.grpc, "flownet2", 30)[0], np.ndarray)


def test_a_name_stands_for_its_addresses(closed_form_triton: triton.Triton) -> None:
    async def run() -> None:
        cluster = Cluster([f"localhost:{closed_form_triton.address.grpc_port}"], "flownet2")
        await cluster.start()
        try:
            serving = [endpoint.address for endpoint in cluster.endpoints if endpoint.models]
            assert serving == [closed_form_triton.address.grpc]
        finally:
            await cluster.close()

    asyncio.run(run())


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """The default model, slow enough that requests are in flight when a Triton is killed."""
    write_model(tmp_path / "repository", delay_s=1, journal=tmp_path / "journal")
    return tmp_path / "repository"


def test_a_killed_triton_costs_one_retry(repository: Path, tmp_path: Path) -> None:
    first, second = picture(1), picture(2)
    body = as_json(encoded(first), encoded(second))
    responses: list[httpx2.Response] = []
    stop = threading.Event()
    stays, goes = triton.local_address(), triton.local_address()
    with wheel.serve(repository, address=stays), wheel.serve(repository, address=goes) as victim:
        endpoints = f"{stays.grpc},{goes.grpc}"
        with run_gateway(endpoints, tmp_path / "log", GATEWAY_DEFAULT_TIMEOUT_S="60") as gateway:
            serving = "flownet2_endpoints_serving"
            metrics = f"{gateway.url}/metrics"
            wait_until(lambda: f"{serving} 2.0" in httpx2.get(metrics).text)

            def client() -> None:
                with httpx2.Client(timeout=120) as session:
                    while not stop.is_set():
                        url = f"{gateway.url}/estimate_flow/"
                        responses.append(session.post(url, json=body))

            clients = [threading.Thread(target=client) for _ in range(4)]
            for thread in clients:
                thread.start()
            wait_until(lambda: "flownet2_slots_used 4.0" in httpx2.get(metrics).text)
            wait_until(lambda: (tmp_path / "journal").read_text().count("started") >= 4)
            os.kill(victim.child.pid, signal.SIGKILL)
            wait_until(lambda: f"{serving} 1.0" in httpx2.get(metrics).text)
            after = len(responses)
            wait_until(lambda: len(responses) >= after + 5)
            stop.set()
            for thread in clients:
                thread.join()
            assert "endpoint lost during a request" in (tmp_path / "log").read_text()

            with wheel.serve(repository, address=goes):  # a Triton that returns is used again
                wait_until(lambda: f"{serving} 2.0" in httpx2.get(metrics).text)
    assert {response.status_code for response in responses} == {200}
    expected = expected_flow(first, second)
    for response in responses:
        np.testing.assert_allclose(np.array(response.json()["flow"]), expected, atol=1e-5)


def stub_of(server: triton.Triton) -> psutil.Process:
    """The process in which a Triton runs its Python model."""
    return next(
        process
        for process in psutil.Process(server.child.pid).children(recursive=True)
        if "stub" in process.name() or "stub" in " ".join(process.cmdline())
    )


def test_a_model_that_is_dead_behind_a_ready_triton(tmp_path: Path) -> None:
    """Triton calls a model ready although its Python process was killed. Such a model gets no
    requests, even if none has failed, and without another one the gateway is not ready."""
    write_model(tmp_path / "repository")
    body = as_json(encoded(picture(1)), encoded(picture(2)))
    with (
        wheel.serve(tmp_path / "repository") as first,
        wheel.serve(tmp_path / "repository") as second,
        run_gateway(f"{first.address.grpc},{second.address.grpc}", tmp_path / "log") as gateway,
    ):

        def serving(count: int) -> bool:
            return f"endpoints_serving {count}.0" in gateway.client.get("/metrics").text

        wait_until(lambda: serving(2))
        stub_of(first).kill()
        statuses = {gateway.client.post("/estimate_flow/", json=body).status_code for _ in range(6)}
        assert statuses == {200}
        wait_until(lambda: serving(1))
        stub_of(second).kill()
        wait_until(lambda: serving(0))  # by the health check alone
        end = time.monotonic() + 3
        while time.monotonic() < end:
            assert gateway.get("/readyz") == 503
            response = gateway.client.post("/estimate_flow/", json=body)
            assert response.status_code == 503
            assert response.headers["retry-after"] == "1"
        servers = gateway.client.get("/healthz").json()["triton"]
        assert all("does not answer" in server["error"] for server in servers)

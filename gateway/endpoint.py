"""One Triton: the models that it serves, health checks, and inference."""

import asyncio
import http.client
import logging
import math
import time
import urllib.request
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from grpc import aio
from tritonclient.grpc import service_pb2 as messages
from tritonclient.grpc.service_pb2_grpc import GRPCInferenceServiceStub

from flownet2 import contract
from flownet2.errors import Error
from flownet2.formats import Flow
from flownet2.models import Model
from flownet2.triton import (
    CHANNEL,
    INFER,
    EngineReport,
    engine_reports,
    failure,
    health_check,
    infer_request,
)
from gateway.errors import (
    DeadlineExceeded,
    GatewayError,
    ImageTooLarge,
    ModelFailed,
    QueueFull,
)
from gateway.images import Pixels

log = logging.getLogger("gateway.endpoint")

INPUTS = dict.fromkeys(contract.IMAGE_INPUTS, (contract.IMAGE_TYPE, [-1, -1, -1, 3]))
OUTPUTS = {contract.FLOW_OUTPUT: (contract.FLOW_TYPE, [-1, -1, -1, 2])}

POLL_SECONDS = 0.5
HEALTH_CHECK_SECONDS = 3.0
"""A health check runs on an idle endpoint that has returned no flow for this long."""
CALL_TIMEOUT_SECONDS = 10.0
"""Deadline of health checks and metadata. A Triton that computes on all cores may respond late; one
that has exited refuses the connection at once."""

ENGINES_SECONDS = 10.0
"""Time between reads of the engines in Triton's metrics."""

MAX_FLOW_SIDES = 4
"""Largest plausible component of a flow, in sides of the image."""


class EndpointLost(Error):
    """Raised when an endpoint failed, or no longer serves the model; another one may serve it."""


class ContractViolation(Error):
    """Raised for a model whose inputs or outputs are not the contract's."""


def classify(code: str, message: str) -> GatewayError | EndpointLost:
    """Return the error for a failed inference, by its gRPC status and message."""
    match failure(code, message):
        case "deadline-exceeded":
            return DeadlineExceeded("The flow was not ready before the request's deadline.")
        case "queue-full":
            return QueueFull("The model's queue is full. Try again later.")
        case "image-too-large":
            return ImageTooLarge(
                "The images are larger than the model's TensorRT engine supports on this GPU. "
                "Leave out size=native, or send smaller images.",
                field="size",
            )
        case "unknown-model" | "unavailable":
            return EndpointLost(message)
        case "model-failed":
            return ModelFailed(f"The model failed: {message[:200].rstrip('.')}.")


def check_contract(metadata: Any) -> None:
    """Compare a model's metadata with the contract.

    Raises:
        ContractViolation: a tensor differs; the message names it.
    """
    for kind, actual, expected in (
        ("input", metadata.inputs, INPUTS),
        ("output", metadata.outputs, OUTPUTS),
    ):
        found = {tensor.name: (tensor.datatype, list(tensor.shape)) for tensor in actual}
        for name in expected.keys() | found.keys():
            if found.get(name) != expected.get(name):
                raise ContractViolation(
                    f"{kind} {name} is {_description(found.get(name))} "
                    f"and should be {_description(expected.get(name))}"
                )


def _description(tensor: tuple[str, list[int]] | None) -> str:
    return f"{tensor[0]} {tensor[1]}" if tensor else "absent"


def check_flow(response: Any, count: int, height: int, width: int) -> Flow:
    """Return the flows in a response, float32 [count, height, width, 2].

    Raises:
        ModelFailed: the shape or type is wrong, or there are values that are not finite or far
            larger than the image.
    """
    expected = [(contract.FLOW_OUTPUT, contract.FLOW_TYPE, [count, height, width, 2])]
    given = [(output.name, output.datatype, list(output.shape)) for output in response.outputs]
    if given != expected:
        raise ModelFailed(f"The model returned {given} instead of {expected}.")
    flow: Flow = np.frombuffer(response.raw_output_contents[0], np.float32)
    flow = flow.reshape(count, height, width, 2)
    # NaN fails both comparisons.
    limit = MAX_FLOW_SIDES * max(height, width, contract.SIZE_MULTIPLE)
    if not (flow.max() < limit and flow.min() > -limit):
        raise ModelFailed("The model returned values that are not finite or far too large.")
    return flow


@dataclass(eq=False)
class Endpoint:
    """Connection to one Triton, and the state that the last health check found.

    Attributes:
        address: host and port of its gRPC service.
        default_model: the model that idle endpoints are checked with.
        version: Triton's version, empty until it was first reached.
        models: models that it serves, by name.
        error: why it serves no model, or not all of its models.
        unverified: models that must pass a health check before they get requests. Triton may call a
            model ready whose process was killed.
        checked: set after the first check.
        engines: engines that run the models, if Triton's metrics can be read.
    """

    address: str
    default_model: str
    metrics_port: int
    version: str = ""
    models: dict[str, Model] = field(default_factory=dict)
    error: str = "not checked yet"

    def __post_init__(self) -> None:
        self.unverified = {self.default_model}
        self.checked = asyncio.Event()
        self.engines: list[EngineReport] = []
        self._in_flight = 0
        self._last_flow = -math.inf
        # The stub itself: tritonclient's class around it takes twice the CPU time.
        self.channel = aio.insecure_channel(self.address, options=CHANNEL)
        self._stub = GRPCInferenceServiceStub(self.channel)
        self._model_infer = self.channel.unary_unary(
            INFER, response_deserializer=messages.ModelInferResponse.FromString
        )

    async def watch(self) -> None:
        """Keep the state up to date until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._watch_models())
            group.create_task(self._watch_engines())

    async def _watch_engines(self) -> None:
        url = f"http://{self.address.rpartition(':')[0]}:{self.metrics_port}/metrics"
        await self.checked.wait()
        while True:
            try:
                metrics = await asyncio.to_thread(_read, url)
                self.engines = engine_reports(metrics)
            except (OSError, ValueError, http.client.HTTPException):  # another port, or a firewall
                self.engines = []
            await asyncio.sleep(ENGINES_SECONDS)

    async def _watch_models(self) -> None:
        while True:
            before = bool(self.models), self.error
            try:
                await self._refresh()
            except Exception as error:  # not a Triton, or a bug: try again
                self.models, self.error = {}, _reason(error)
            if (bool(self.models), self.error) != before:
                level = logging.WARNING if self.error else logging.INFO
                state = {"endpoint": self.address, "models": sorted(self.models)}
                log.log(level, self.error or "endpoint is serving", extra=state)
            self.checked.set()
            await asyncio.sleep(POLL_SECONDS)

    async def _refresh(self) -> None:
        # The statistics list the models that are ready. The repository's index is reserved for the
        # operator, together with the right to load and unload models.
        statistics = await self._stub.ModelStatistics(
            messages.ModelStatisticsRequest(), timeout=CALL_TIMEOUT_SECONDS
        )
        if not self.models:  # a new connection, perhaps to another server
            server = await self._stub.ServerMetadata(
                messages.ServerMetadataRequest(), timeout=CALL_TIMEOUT_SECONDS
            )
            self.version = server.version
        ready = sorted({model.name for model in statistics.model_stats})
        found = await asyncio.gather(*map(self._describe, ready), return_exceptions=True)
        models, errors = {}, []
        for name, described in zip(ready, found, strict=True):
            try:
                if isinstance(described, BaseException):
                    raise described
                model, gpu = described
                await self._check(name, gpu)
                models[name] = model
            except ContractViolation as error:
                errors.append(f"{name}: {error}")
            except Exception as error:  # of this model; the others are served
                errors.append(f"{name}: {_reason(error)}")
                self.unverified.add(name)
        self.unverified &= {*ready, self.default_model}
        self.models = models
        self.error = "; ".join(errors) or ("" if models else "no model is ready")

    async def _check(self, name: str, gpu: bool) -> None:
        """Run the health-check inference of a model if it is due.

        Raises:
            EndpointLost, GatewayError: the model does not answer, or its flow is wrong.
        """
        idle = not self._in_flight and time.monotonic() - self._last_flow > HEALTH_CHECK_SECONDS
        if name in self.unverified or (idle and name == self.default_model):
            await self.infer(
                name,
                *health_check(gpu).values(),
                timeout=CALL_TIMEOUT_SECONDS,
                request_id="health-check",
                headers={},
            )

    async def _describe(self, name: str) -> tuple[Model, bool]:
        """Return a model's description, and True if it runs on a GPU.

        Raises:
            ContractViolation: its inputs or outputs are not the contract's.
        """
        metadata = await self._stub.ModelMetadata(
            messages.ModelMetadataRequest(name=name), timeout=CALL_TIMEOUT_SECONDS
        )
        check_contract(metadata)
        # Every time: the model may have been loaded again with other files.
        response = await self._stub.ModelConfig(
            messages.ModelConfigRequest(name=name), timeout=CALL_TIMEOUT_SECONDS
        )
        config = response.config
        model = Model.from_parameters(
            name,
            config.parameters,
            version=max(metadata.versions, default="", key=int),
            backend=config.backend,
            default=name == self.default_model,
        )
        return model, any(group.kind == group.KIND_GPU for group in config.instance_group)

    def mark_unhealthy(self, model: str, error: str) -> None:
        """Send no requests for the model to this endpoint until it passes a health check."""
        self.unverified.add(model)
        self.models = {name: served for name, served in self.models.items() if name != model}
        self.error = f"{model}: does not answer: {error}"

    async def infer(
        self,
        model: str,
        image1: Pixels,
        image2: Pixels,
        *,
        timeout: float,
        request_id: str,
        headers: dict[str, str],
    ) -> Flow:
        """Run an inference on one batch, and return its flows.

        Args:
            model: name of the model.
            image1: first images, uint8 [N, height, width, 3].
            image2: second images, of the same shape.
            timeout: seconds until the inference is cancelled.
            request_id: ID that Triton logs.
            headers: gRPC metadata, for tracing.

        Raises:
            EndpointLost: another endpoint may succeed.
            DeadlineExceeded, QueueFull, ImageTooLarge, ModelFailed: another endpoint would fail
                too.
        """
        # In the message, not in shared memory: that would save 1 to 2 of 26 to 59 ms of CPU time,
        # but the region of a cancelled request may be written to after its next use.
        count, height, width, _ = image1.shape
        request = infer_request(model, image1, image2, timeout, request_id)
        self._in_flight += 1
        try:
            response = await self._model_infer(
                request, timeout=timeout, metadata=tuple(headers.items())
            )
        except aio.AioRpcError as error:
            raise classify(error.code().name, error.details() or "") from error
        finally:
            self._in_flight -= 1
        flow = check_flow(response, count, height, width)
        self.unverified.discard(model)
        if model == self.default_model:
            self._last_flow = time.monotonic()
        return flow


def _reason(error: Exception) -> str:
    """Return an error in words."""
    if isinstance(error, aio.AioRpcError):
        return f"{error.code().name}: {error.details()}"
    if isinstance(error, EndpointLost | GatewayError):
        return f"does not answer: {error}"
    return str(error) if isinstance(error, Error) else f"{type(error).__name__}: {error}"


def _read(url: str) -> str:
    """Return the text at a URL, without a proxy: Triton is on the local network."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(url, timeout=CALL_TIMEOUT_SECONDS) as response:
        content: bytes = response.read()
        return content.decode()

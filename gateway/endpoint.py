"""One Triton: what it serves, whether that answers, and a flow from it."""

import asyncio
import logging
import math
import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from grpc import aio
from tritonclient.grpc import service_pb2 as messages
from tritonclient.grpc.service_pb2_grpc import GRPCInferenceServiceStub

from flownet2 import contract
from flownet2.formats import Flow
from flownet2.triton import CHANNEL, failure
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
CANARY_SECONDS = 3.0
"""An idle endpoint that has returned no flow for so long is asked for one."""
CANARY = np.zeros((1, contract.SIZE_MULTIPLE, contract.SIZE_MULTIPLE, 3), np.uint8)
PATIENCE_SECONDS = 10.0
"""A Triton that computes on all cores may respond late; one that is gone refuses at once."""

LONGEST_FLOW = 4
"""Largest component of flow that is believed, in sides of the image."""


class EndpointLost(Exception):
    """The endpoint went away, or no longer serves the model; another one may."""


class ContractBroken(Exception):
    """A model has other inputs or outputs than the contract's."""


@dataclass(frozen=True)
class Model:
    """A model that an endpoint serves; the last five as its `parameters` in config.pbtxt say."""

    name: str
    version: str
    backend: str
    network: str | None
    parameters: int | None
    weights_source: str | None
    weights_license: str | None
    model_sha256: str | None


def classify(code: str, message: str) -> GatewayError | EndpointLost:
    """What a failed inference means, by its gRPC status and message."""
    match failure(code, message):
        case "deadline-exceeded":
            return DeadlineExceeded("The flow was not ready before the request's deadline.")
        case "queue-full":
            return QueueFull("The model's queue is full. Try again later.")
        case "image-too-large":
            return ImageTooLarge(
                "The images are larger than the model's TensorRT engine takes on this GPU. "
                "Send smaller ones, or leave size=native out.",
                field="size",
            )
        case "unknown-model" | "unavailable":
            return EndpointLost(message)
        case "model-failed":
            return ModelFailed(f"The model failed: {message[:200].rstrip('.')}.")


def check_contract(metadata: Any) -> None:
    """Compare a model's metadata with the contract.

    Raises:
        ContractBroken: naming the tensor, what it is and what it should be.
    """
    for kind, actual, expected in (
        ("input", metadata.inputs, INPUTS),
        ("output", metadata.outputs, OUTPUTS),
    ):
        found = {tensor.name: (tensor.datatype, list(tensor.shape)) for tensor in actual}
        for name in expected.keys() | found.keys():
            if found.get(name) != expected.get(name):
                raise ContractBroken(
                    f"{kind} {name} is {_shown(found.get(name))} "
                    f"and should be {_shown(expected.get(name))}"
                )


def _shown(tensor: tuple[str, list[int]] | None) -> str:
    return f"{tensor[0]} {tensor[1]}" if tensor else "absent"


def check_flow(response: Any, count: int, height: int, width: int) -> Flow:
    """The flows in a response, checked to be [count, height, width, 2].

    Raises:
        ModelFailed: another shape or type, values that are not finite, or far beyond the image.
    """
    expected = [(contract.FLOW_OUTPUT, contract.FLOW_TYPE, [count, height, width, 2])]
    given = [(one.name, one.datatype, list(one.shape)) for one in response.outputs]
    if given != expected:
        raise ModelFailed(f"The model returned {given} instead of {expected}.")
    flow: Flow = np.frombuffer(response.raw_output_contents[0], np.float32)
    flow = flow.reshape(count, height, width, 2)
    # Few vectors are longer than their image, and a NaN is not less than anything.
    limit = LONGEST_FLOW * max(height, width, contract.SIZE_MULTIPLE)
    if not (flow.max() < limit and flow.min() > -limit):
        raise ModelFailed("The model returned values that are not finite, or far beyond the image.")
    return flow


@dataclass(eq=False)
class Endpoint:
    """One Triton: its connection, and what it served when last asked."""

    address: str
    default_model: str
    version: str = ""
    models: dict[str, Model] = field(default_factory=dict)
    error: str = "not asked yet"

    def __post_init__(self) -> None:
        # What Triton calls ready may be dead (a Python backend's process that was killed), so these
        # are served only once they have returned a flow.
        self.unproven = {self.default_model}
        self.asked = asyncio.Event()  # at least once
        self._in_flight = 0
        self._last_flow = -math.inf
        # The stub itself: tritonclient's class around it takes twice the processor time.
        self.channel = aio.insecure_channel(self.address, options=CHANNEL)
        self._stub = GRPCInferenceServiceStub(self.channel)

    async def watch(self) -> None:
        """Keep `models` and `error` up to date, for ever."""
        while True:
            before = bool(self.models), self.error
            try:
                await self._refresh()
            except aio.AioRpcError as error:
                self.lose(f"{error.code().name}: {error.details()}")
            except Exception as error:  # no Triton, or a bug: ask again
                self.lose(repr(error))
            if (bool(self.models), self.error) != before:
                level = logging.WARNING if self.error else logging.INFO
                state = {"endpoint": self.address, "models": sorted(self.models)}
                log.log(level, self.error or "endpoint is serving", extra=state)
            self.asked.set()
            await asyncio.sleep(POLL_SECONDS)

    async def _refresh(self) -> None:
        # Of all models that are ready. The repository's index is for the operator alone, as it goes
        # with the right to load and unload them.
        statistics = await self._stub.ModelStatistics(
            messages.ModelStatisticsRequest(), timeout=PATIENCE_SECONDS
        )
        ready = {one.name for one in statistics.model_stats}
        if not self.models:  # a new connection: what is there now may be another server
            server = await self._stub.ServerMetadata(
                messages.ServerMetadataRequest(), timeout=PATIENCE_SECONDS
            )
            self.version = server.version
        models, errors = {}, []
        for name in sorted(ready):
            try:
                models[name] = await self._describe(name)
                await self._prove(name)
            except ContractBroken as error:
                errors.append(f"{name}: {error}")
            except (EndpointLost, GatewayError) as error:
                errors.append(f"{name} does not answer: {error}")
                self.unproven.add(name)
                del models[name]
        self.models = models
        self.error = "; ".join(errors) or ("" if models else "no model is ready")

    async def _prove(self, model: str) -> None:
        """Ask a model for a flow, if it is time to.

        Raises:
            EndpointLost, GatewayError: there was none.
        """
        idle = not self._in_flight and time.monotonic() - self._last_flow > CANARY_SECONDS
        if model in self.unproven or (idle and model == self.default_model):
            await self.infer(
                model, CANARY, CANARY, timeout=PATIENCE_SECONDS, request_id="canary", headers={}
            )

    async def _describe(self, name: str) -> Model:
        # Each time anew: it may be loaded again with other files.
        metadata = await self._stub.ModelMetadata(
            messages.ModelMetadataRequest(name=name), timeout=PATIENCE_SECONDS
        )
        check_contract(metadata)
        found = await self._stub.ModelConfig(
            messages.ModelConfigRequest(name=name), timeout=PATIENCE_SECONDS
        )
        facts = {key: value.string_value for key, value in found.config.parameters.items()}
        count = facts.get("parameters", "")
        return Model(
            name,
            metadata.versions[-1],
            found.config.backend,
            facts.get("network"),
            int(count) if count.isdecimal() else None,
            facts.get("weights_source"),
            facts.get("weights_license"),
            facts.get("model_sha256"),
        )

    def lose(self, error: str) -> None:
        """Use the endpoint no more, until `watch` finds it serving."""
        self.models = {}
        self.error = error

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
        """One batch here.

        Raises:
            EndpointLost: another endpoint may answer.
            DeadlineExceeded, QueueFull, ImageTooLarge, ModelFailed: no other endpoint would do
                better.
        """
        # In the message, not in shared memory: that saves 1 to 2 of 26 to 59 ms of processor time,
        # and the region of a request that was cancelled may be written to after its next use.
        count, height, width, _ = image1.shape
        request = messages.ModelInferRequest(
            model_name=model,
            id=request_id,
            inputs=[
                {"name": name, "datatype": contract.IMAGE_TYPE, "shape": image1.shape}
                for name in contract.IMAGE_INPUTS
            ],
            raw_input_contents=[image1.tobytes(), image2.tobytes()],
        )
        # Bounds the time in Triton's queue.
        request.parameters["timeout"].int64_param = max(1, int(timeout * 1e6))
        self._in_flight += 1
        try:
            response = await self._stub.ModelInfer(
                request, timeout=timeout, metadata=tuple(headers.items())
            )
        except aio.AioRpcError as error:
            raise classify(error.code().name, error.details() or "") from error
        finally:
            self._in_flight -= 1
        flow = check_flow(response, count, height, width)
        self.unproven.discard(model)
        if model == self.default_model:
            self._last_flow = time.monotonic()
        return flow

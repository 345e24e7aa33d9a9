"""What the gateway says of itself: probes, the models that are loaded, metrics."""

from typing import Literal

from fastapi import APIRouter
from pydantic import BaseModel, Field
from starlette.responses import Response

import flownet2
from gateway.errors import InferenceUnavailable, MethodNotAllowed, Stopping, Unauthorized
from gateway.metrics import CONTENT_TYPE
from gateway.schemas import error_responses
from gateway.state import SharedState, State

probes = APIRouter()
"""Needs no API key."""
reports = APIRouter()


class Status(BaseModel):
    """What a probe says."""

    status: str


class ServedModel(BaseModel):
    """A network that is loaded, and whose weights it has."""

    name: str = Field(description="for `?model=`")
    version: str
    network: str | None = Field(description="name of the network's architecture")
    parameters: int | None = Field(description="number of weights and biases")
    weights_source: str | None
    weights_license: str | None
    model_sha256: str | None = Field(description="of the exported network with its weights")
    default: bool = Field(description="whether it answers requests without `?model=`")


class Models(BaseModel):
    """The networks that are loaded."""

    models: list[ServedModel]


class EndpointHealth(BaseModel):
    """One Triton, as last seen."""

    address: str
    version: str = Field(description="Triton's version; empty while it was never reached")
    models: list[str] = Field(description="models that it serves, those that answer")
    backends: list[str] = Field(
        description="what computes them: tensorrt, onnxruntime (no engine was there), python (CPU)"
    )
    error: str = Field(description="why it serves nothing, or not all of its models")


class Health(BaseModel):
    """The gateway and the Tritons behind it."""

    status: Literal["ok", "unavailable", "stopping"]
    version: str = Field(description="the gateway's version")
    model: ServedModel | None = Field(description="the default model, while it is served")
    triton: list[EndpointHealth]


def _served(state: State) -> list[ServedModel]:
    return [
        ServedModel(**vars(model), default=name == state.settings.default_model)
        for name, model in sorted(state.cluster.models().items())
    ]


@reports.get("/models", responses=error_responses(Unauthorized, MethodNotAllowed))
async def models(state: SharedState) -> Models:
    """The networks that are loaded, with the source and licence of their weights."""
    return Models(models=_served(state))


@probes.head("/livez", include_in_schema=False)
@probes.get("/livez")
async def livez() -> Status:
    """Whether the process answers."""
    return Status(status="ok")


@probes.head("/readyz", include_in_schema=False)
@probes.get("/readyz", responses=error_responses(InferenceUnavailable, Stopping))
async def readyz(state: SharedState) -> Status:
    """Whether requests for flow are answered: some Triton serves the default model."""
    if state.stopping:
        raise Stopping("The gateway is shutting down.")
    state.cluster.require(state.settings.default_model)
    return Status(status="ok")


@probes.head("/healthz", include_in_schema=False)
@probes.get("/healthz")
async def healthz(state: SharedState) -> Health:
    """Versions and states of the gateway, of every Triton, and of the default model."""
    default = next((model for model in _served(state) if model.default), None)
    status: Literal["ok", "unavailable"] = "ok" if default else "unavailable"
    return Health(
        status="stopping" if state.stopping else status,
        version=flownet2.__version__,
        model=default,
        triton=[
            EndpointHealth(
                address=endpoint.address,
                version=endpoint.version,
                models=sorted(endpoint.models),
                backends=sorted({model.backend for model in endpoint.models.values()}),
                error=endpoint.error,
            )
            for endpoint in state.cluster.endpoints
        ],
    )


@reports.head("/metrics", include_in_schema=False)
@reports.get(
    "/metrics",
    response_class=Response,
    responses=error_responses(Unauthorized)
    | {200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
)
async def metrics(state: SharedState) -> Response:
    """Metrics in Prometheus' text format."""
    return Response(state.metrics.exposition(), media_type=CONTENT_TYPE)

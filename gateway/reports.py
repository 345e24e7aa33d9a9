"""Endpoints that report on the gateway: probes, loaded models, metrics."""

from typing import Annotated, Literal

from fastapi import APIRouter, Depends
from pydantic import BaseModel, Field
from starlette.responses import Response

import flownet2
from gateway.errors import InferenceUnavailable, MethodNotAllowed, Stopping, Unauthorized
from gateway.keys import has_key
from gateway.metrics import CONTENT_TYPE
from gateway.schemas import error_responses
from gateway.state import SharedState, State

probes = APIRouter()
"""Endpoints without API key."""
reports = APIRouter()


class Status(BaseModel):
    """State of the service."""

    status: str


class ServedModel(BaseModel):
    """A network that is loaded."""

    name: str = Field(description="value for `?model=`")
    version: str
    network: str | None = Field(description="name of the architecture")
    parameters: int | None = Field(description="number of weights and biases")
    weights_source: str | None = Field(description="origin of the weights")
    weights_license: str | None = Field(description="licence of the weights")
    model_sha256: str | None = Field(description="SHA-256 of the exported network with its weights")
    max_pixels: int | None = Field(
        description="largest number of pixels that it computes, each side of an image rounded up "
        "to a multiple of 64; null: the gateway's limit alone"
    )
    default: bool = Field(description="true for the model of requests without `?model=`")


class Models(BaseModel):
    """The networks that are loaded."""

    models: list[ServedModel]


class Engine(BaseModel):
    """Engine that runs a model."""

    model: str
    engine: str = Field(description="such as openvino or onnxruntime")
    device: str
    precision: str
    golden_difference_px: float = Field(
        description="mean distance in pixels to the flow of the golden pair, when it was loaded"
    )


class EndpointHealth(BaseModel):
    """One Triton, as the last health check found it."""

    address: str
    version: str = Field(description="Triton's version; empty until it was first reached")
    models: list[str] = Field(description="models that it serves")
    backends: list[str] = Field(description="Triton backends that run them: tensorrt or python")
    engines: list[Engine] = Field(
        description="engines of the models that check themselves against a golden pair; empty if "
        "Triton's metrics cannot be read"
    )
    error: str = Field(description="why it serves no model, or not all of its models")


class Health(BaseModel):
    """The gateway and the Tritons behind it; for a client without API key the status alone."""

    status: Literal["ok", "unavailable", "stopping"]
    version: str | None = Field(default=None, description="the gateway's version")
    model: ServedModel | None = Field(
        default=None, description="the default model, while it is served"
    )
    triton: list[EndpointHealth] | None = None


def _served(state: State) -> list[ServedModel]:
    return [
        ServedModel.model_validate(model, from_attributes=True)
        for _, model in sorted(state.cluster.models().items())
    ]


@reports.get("/models", responses=error_responses(Unauthorized, MethodNotAllowed))
async def models(state: SharedState) -> Models:
    """List the loaded networks, with the origin and licence of their weights, and their limits."""
    return Models(models=_served(state))


@probes.head("/livez", include_in_schema=False)
@probes.get("/livez")
async def livez() -> Status:
    """Answer as long as the process does: the liveness probe."""
    return Status(status="ok")


@probes.head("/readyz", include_in_schema=False)
@probes.get("/readyz", responses=error_responses(InferenceUnavailable, Stopping))
async def readyz(state: SharedState) -> Status:
    """Succeed if a Triton serves the default model: the readiness probe."""
    if state.stopping:
        raise Stopping("The gateway is shutting down.")
    state.cluster.require(state.settings.default_model)
    return Status(status="ok")


@probes.head("/healthz", include_in_schema=False)
@probes.get("/healthz", response_model_exclude_unset=True)
async def healthz(state: SharedState, detailed: Annotated[bool, Depends(has_key)]) -> Health:
    """Report versions and states of the gateway, of every Triton, and of the default model.

    If API keys are required, a request without one gets the status alone.
    """
    default = next((model for model in _served(state) if model.default), None)
    status: Literal["ok", "unavailable"] = "ok" if default else "unavailable"
    health = Health(status="stopping" if state.stopping else status)
    if detailed:
        health.version = flownet2.__version__
        health.model = default
        health.triton = [
            EndpointHealth(
                address=endpoint.address,
                version=endpoint.version,
                models=sorted(endpoint.models),
                backends=sorted({model.backend or "" for model in endpoint.models.values()}),
                engines=[
                    Engine.model_validate(engine, from_attributes=True)
                    for engine in endpoint.engines
                ],
                error=endpoint.error,
            )
            for endpoint in state.cluster.endpoints
        ]
    return health


@reports.head("/metrics", include_in_schema=False)
@reports.get(
    "/metrics",
    response_class=Response,
    responses=error_responses(Unauthorized)
    | {200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
)
async def metrics(state: SharedState) -> Response:
    """Return metrics in Prometheus' text format."""
    return Response(state.metrics.exposition(), media_type=CONTENT_TYPE)

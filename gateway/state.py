"""What all requests of one gateway share, and how an endpoint gets at it."""

from typing import Annotated

from fastapi import Depends, Request

from gateway.admission import Limits
from gateway.cluster import Cluster
from gateway.metrics import Metrics
from gateway.settings import Settings
from gateway.threads import Threads


class State:
    """One gateway's settings, limits, Tritons, metrics and threads."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.limits = Limits(
            settings.max_in_flight, settings.max_waiting, settings.max_buffered_bytes
        )
        self.cluster = Cluster(settings.triton_endpoints, settings.default_model)
        self.metrics = Metrics(self.limits, self.cluster)
        self.threads = Threads(settings.threads)
        self.stopping = False


async def _state_of(request: Request) -> State:
    state: State = request.app.state.gateway
    return state


SharedState = Annotated[State, Depends(_state_of)]
"""An endpoint's parameter of this type is the application's state."""

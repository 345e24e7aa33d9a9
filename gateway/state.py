"""State that all requests of a gateway share, and the dependency that gives it to an endpoint."""

from typing import Annotated

from fastapi import Depends, Request

from gateway.admission import Limits
from gateway.cluster import Cluster
from gateway.keys import ApiKeys
from gateway.metrics import Metrics
from gateway.settings import Settings
from gateway.threads import Threads


class State:
    """Settings, budgets, Tritons, API keys, metrics and threads of a gateway.

    Attributes:
        stopping: True from SIGTERM on; `/readyz` then fails.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.limits = Limits(
            settings.max_in_flight, settings.max_waiting, settings.max_buffered_bytes
        )
        self.cluster = Cluster(
            settings.triton_endpoints, settings.default_model, settings.triton_metrics_port
        )
        self.keys = ApiKeys(settings.api_keys_file)
        self.metrics = Metrics(self.limits, self.cluster)
        self.threads = Threads(settings.threads)
        self.stopping = False


async def _state_of(request: Request) -> State:
    state: State = request.app.state.gateway
    return state


SharedState = Annotated[State, Depends(_state_of)]
"""Type of a parameter that FastAPI fills with the application's state."""

"""State of one request while it is served."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from starlette.requests import Request
from starlette.types import Scope


@dataclass
class Context:
    """Identity, measurements and outcome of a request."""

    request_id: str
    started: float = field(default_factory=time.perf_counter)
    stages: dict[str, float] = field(default_factory=dict)
    outcome: str = "ok"
    trace_headers: dict[str, str] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the duration of the block to a stage, in seconds."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.stages[name] = self.stages.get(name, 0.0) + time.perf_counter() - start

    def elapsed(self) -> float:
        """Return the seconds since the request's head was read."""
        return time.perf_counter() - self.started

    def server_timing(self) -> str:
        """Return the `Server-Timing` header: stages and total so far, in milliseconds."""
        parts = {**self.stages, "total": self.elapsed()}
        return ", ".join(f"{name};dur={seconds * 1e3:.1f}" for name, seconds in parts.items())


def context_of(source: Request | Scope) -> Context:
    """Return the context that the middleware attached to a request."""
    scope = source.scope if isinstance(source, Request) else source
    context: Context = scope["state"]["context"]
    return context

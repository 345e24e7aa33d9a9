"""What the gateway remembers of one request while it is served."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from starlette.requests import Request
from starlette.types import Scope


@dataclass
class Context:
    """One request's identity, measurements and outcome."""

    request_id: str
    started: float = field(default_factory=time.perf_counter)
    stages: dict[str, float] = field(default_factory=dict)
    outcome: str = "ok"
    trace_headers: dict[str, str] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Measure one stage, in seconds."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.stages[name] = self.stages.get(name, 0.0) + time.perf_counter() - start

    def elapsed(self) -> float:
        """Seconds since the request's head was read."""
        return time.perf_counter() - self.started

    def server_timing(self) -> str:
        """The `Server-Timing` header: stages and the total so far, in milliseconds."""
        parts = {**self.stages, "total": self.elapsed()}
        return ", ".join(f"{name};dur={seconds * 1e3:.1f}" for name, seconds in parts.items())


def context_of(source: Request | Scope) -> Context:
    """The context that the middleware gave a request."""
    scope = source.scope if isinstance(source, Request) else source
    context: Context = scope["state"]["context"]
    return context

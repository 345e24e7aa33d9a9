"""Cache of networks compiled for one shape each, within a memory limit; used by both engines."""

from collections.abc import Callable
from typing import Generic, TypeVar

Shape = tuple[int, ...]
Plan = TypeVar("Plan")


class PlannedShapes(Generic[Plan]):
    """Cache of plans, networks compiled for one shape; evicts the least recently used.

    A plan larger than the limit is compiled too, and is then the only one.
    """

    def __init__(
        self, compile_for: Callable[[Shape], Plan], memory_of: Callable[[Shape], int], limit: int
    ) -> None:
        """Create an empty cache.

        Args:
            compile_for: returns the plan of a shape.
            memory_of: returns the bytes that the plan of a shape occupies.
            limit: bytes that all plans may occupy.
        """
        self._compile_for = compile_for
        self._memory_of = memory_of
        self._limit = limit
        self._plans: dict[Shape, Plan] = {}  # the least recently used first

    def __contains__(self, shape: Shape) -> bool:
        """Return True if the shape has a plan."""
        return shape in self._plans

    def __getitem__(self, shape: Shape) -> Plan:
        """Return the plan of a shape, compiled now if it has none."""
        plan = self._plans.pop(shape, None)
        if plan is None:
            # Before the compilation, which needs the memory.
            while self._plans and sum(map(self._memory_of, (*self._plans, shape))) > self._limit:
                del self._plans[next(iter(self._plans))]
            plan = self._compile_for(shape)
        self._plans[shape] = plan
        return plan

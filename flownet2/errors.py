"""The errors that every part of the package may raise."""

import contextlib
from collections.abc import Iterator
from typing import Any

PROBLEM = "urn:problem-type:flownet2:"
"""Prefix of the `type` of every problem."""
UNREACHABLE = PROBLEM + "unreachable"


class Error(Exception):
    """Base class of the package's errors; the message says what is wrong and what to change."""


class FlowError(Error):
    """Raised when a client cannot return a flow.

    Attributes:
        type: name of the problem, the same as the gateway's: `urn:problem-type:flownet2:…`.
        detail: what is wrong and what to change; also the message.
        field: the image or parameter that is wrong, or None.
        unavailable: True if the servers are full or unreachable, and the same call may succeed
            later.
    """

    def __init__(
        self, type: str, detail: str, field: str | None = None, unavailable: bool = False
    ) -> None:
        super().__init__(detail)
        self.type = type
        self.detail = detail
        self.field = field
        self.unavailable = unavailable

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.type, self.detail, self.field, self.unavailable)


class MissingExtra(Error):
    """Raised when a function needs an extra that is not installed."""


@contextlib.contextmanager
def requires_extra(extra: str) -> Iterator[None]:
    """Convert failed imports of an extra's packages inside this context.

    Raises:
        MissingExtra: a package is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        name = (error.name or "").partition(".")[0]
        if name == "flownet2":
            raise
        raise MissingExtra(
            f"{name} is not installed: pip install 'flownet2-triton[{extra}]'"
        ) from error

"""The base class of the package's errors, and the error for an extra that is not installed."""

import contextlib
from collections.abc import Iterator


class Error(Exception):
    """Base class of the package's errors; the message says what is wrong and what to change."""


class MissingExtra(Error):
    """A function needs packages of an extra that is not installed."""


@contextlib.contextmanager
def requires_extra(extra: str) -> Iterator[None]:
    """Import packages of an extra inside this context.

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

"""Optical flow with FlowNet 2.0: the service's contract, file formats, measures and client."""

import importlib
from typing import TYPE_CHECKING

from flownet2.errors import Error

if TYPE_CHECKING:
    from flownet2.client import AsyncClient, Client, FlowError, Result
    from flownet2.formats import FormatError, read_flow, write_flow
    from flownet2.models import Model

__version__ = "1.0.0"

__all__ = [
    "AsyncClient",
    "Client",
    "Error",
    "FlowError",
    "FormatError",
    "Model",
    "Result",
    "read_flow",
    "write_flow",
]

# Imported when they are asked for: who needs the contract alone needs no more than Python.
_FORMATS = ("FormatError", "read_flow", "write_flow")


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = "flownet2.models" if name == "Model" else "flownet2.client"
    module = "flownet2.formats" if name in _FORMATS else module
    return getattr(importlib.import_module(module), name)

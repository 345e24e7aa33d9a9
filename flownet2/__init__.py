"""Optical flow with FlowNet 2.0: clients of the service, and flow files.

Every error that the package raises is an `Error`:

* Error
  + FlowError: a client returns no flow; `type` names the problem
  + FormatError: a file is not a flow, or a flow does not fit a format
  + ImageError: an image cannot be read
  + MissingExtra: an optional package is not installed

The command's own errors derive from `Error` as well.
"""

import importlib
from typing import TYPE_CHECKING

from flownet2.errors import Error, FlowError, MissingExtra

if TYPE_CHECKING:
    from flownet2.backends import Result
    from flownet2.client import AsyncClient, Client
    from flownet2.formats import FormatError, read_flow, write_flow
    from flownet2.images import ImageError
    from flownet2.models import Model

__version__ = "1.0.0"

__all__ = [
    "AsyncClient",
    "Client",
    "Error",
    "FlowError",
    "FormatError",
    "ImageError",
    "MissingExtra",
    "Model",
    "Result",
    "read_flow",
    "write_flow",
]

# Imported on first use, so that programs that need only the contract need no other package.
_MODULES = {
    "AsyncClient": "client",
    "Client": "client",
    "FormatError": "formats",
    "ImageError": "images",
    "Model": "models",
    "Result": "backends",
    "read_flow": "formats",
    "write_flow": "formats",
}


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"flownet2.{_MODULES[name]}"), name)

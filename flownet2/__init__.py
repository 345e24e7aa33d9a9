"""Optical flow with FlowNet 2.0: the service's contract, file formats, measures and client."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flownet2.formats import FormatError, read_flow, write_flow

__all__ = ["FormatError", "read_flow", "write_flow"]

# Imported when they are asked for: who needs the contract alone needs no more than Python.
_MODULES = {name: "flownet2.formats" for name in ("FormatError", "read_flow", "write_flow")}


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)

"""`flownet2 serve`."""

import runpy
import sys

from flownet2 import service
from flownet2.command.terminal import fail


def serve() -> None:
    """Run Triton and the gateway of this checkout until Ctrl-C, as `make serve` does."""
    if not service.is_checkout():
        fail("no server is installed here: run `make serve` in a checkout of the project")
    sys.argv = ["launch"]
    runpy.run_module("launch", run_name="__main__", alter_sys=True)

"""`python -m gateway`: the service, configured by environment variables (`gateway.settings`)."""

import asyncio
import logging
import os
import signal
import socket
import sys
from types import FrameType
from typing import Any

import uvicorn
from pydantic import ValidationError

from gateway import logs, workers
from gateway.app import create_app
from gateway.protocol import Protocol
from gateway.settings import Settings
from gateway.state import State
from gateway.system import tune_malloc

STALL_MS = 60_000
"""A client that acknowledges nothing for so long is cut off, and holds no response any more."""


class Server(uvicorn.Server):
    """Uvicorn, with a stop that load balancers can see coming.

    On SIGTERM `/readyz` fails at once, connections are accepted for a moment more, then requests
    in flight finish, and the process exits with status 0. SIGINT skips the moment.
    """

    def __init__(self, config: uvicorn.Config, state: State, delay_s: float) -> None:
        super().__init__(config)
        self._state = state
        self._delay_s = delay_s

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to stop, or stop at once when asked again."""
        if self._state.stopping:
            self.should_exit = True
            self.force_exit = sig == signal.SIGINT
            return
        self._state.stopping = True
        logging.getLogger("gateway").info("stopping")
        if sig == signal.SIGINT:
            self.should_exit = True
            return
        loop = asyncio.get_running_loop()
        loop.call_soon_threadsafe(loop.call_later, self._delay_s, self._exit)

    def _exit(self) -> None:
        self.should_exit = True


def main() -> int:
    """Run the gateway until a signal ends it; 2 when a setting cannot be used."""
    tune_malloc()
    try:
        settings = Settings()
        logs.configure(settings.log_level)
        app = create_app(settings)
    except ValidationError as error:
        for one in error.errors():
            name = "_".join(map(str, one["loc"])) or "settings"
            print(f"{name}: {one['msg']}", file=sys.stderr)
        return 2
    except (ValueError, OSError, ImportError) as error:
        print(error, file=sys.stderr)
        return 2
    options: dict[str, Any] = {
        "loop": "uvloop",
        "http": Protocol,  # httptools is faster by a millisecond, and keeps headers without limit
        "ws": "none",
        "access_log": False,
        "log_config": None,
        "server_header": False,
        "timeout_graceful_shutdown": settings.shutdown_grace_s,
    }
    config = uvicorn.Config(app, settings.host, settings.port, **options)
    listener = config.bind_socket()
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, STALL_MS)
    if settings.processes > 1:
        return workers.serve(settings, listener, **options)
    server = Server(config, app.state.gateway, settings.shutdown_delay_s)
    server.run([listener])
    return 0 if server.started else 1


if __name__ == "__main__":
    # Without the threads that still decode what nobody waits for: nothing can stop them.
    os._exit(main())

"""`python -m gateway`: run the service. `gateway.settings` lists its environment variables."""

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

from flownet2.memory import keep_freed_memory
from gateway import logs, workers
from gateway.app import create_app
from gateway.protocol import Protocol
from gateway.settings import Settings
from gateway.state import State

STALL_MS = 60_000
"""TCP user timeout: the connection of a client that acknowledges no data for this long is dropped,
and its response is freed."""
BACKLOG = 2048

log = logging.getLogger("gateway")


class Server(uvicorn.Server):
    """Uvicorn with a shutdown that load balancers can follow.

    On SIGTERM `/readyz` fails at once, connections are accepted for a short delay, then requests in
    flight finish, and the process exits with status 0. SIGINT skips the delay.
    """

    def __init__(self, config: uvicorn.Config, state: State, delay_s: float) -> None:
        super().__init__(config)
        self._state = state
        self._delay_s = delay_s

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin the shutdown; exit at once on a second signal."""
        if self._state.stopping:
            self.should_exit = True
            self.force_exit = sig == signal.SIGINT
            return
        self._state.stopping = True
        log.info("stopping")
        if sig == signal.SIGINT:
            self.should_exit = True
            return
        loop = asyncio.get_running_loop()
        loop.call_soon_threadsafe(loop.call_later, self._delay_s, self._exit)

    def _exit(self) -> None:
        self.should_exit = True


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens on an address or a host name, by IPv4 if it has both.

    `::` stands for all IPv6 and IPv4 addresses. A host that does not resolve is ignored with a
    warning: conda's compilers set HOST to the machine's triple.

    Raises:
        OSError: the port is in use, or the address is not this machine's.
    """
    try:
        found = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        log.warning("HOST=%s is not an address and does not resolve: using 127.0.0.1", host)
        found = socket.getaddrinfo("127.0.0.1", port, type=socket.SOCK_STREAM)
    found.sort(key=lambda entry: entry[0] != socket.AF_INET)
    family, _, _, _, address = found[0]
    listener = socket.create_server(
        address,
        family=family,
        backlog=BACKLOG,
        dualstack_ipv6=family == socket.AF_INET6 and address[0] == "::",
    )
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, STALL_MS)
    log.info("listening", extra={"address": address[0], "port": listener.getsockname()[1]})
    return listener


def main() -> int:
    """Run the gateway until a signal arrives; return 2 if a setting is invalid."""
    keep_freed_memory()
    try:
        settings = Settings()
        logs.configure(settings.log_level)
        app = create_app(settings)
        listener = listen(settings.host, settings.port)
    except ValidationError as invalid:
        for error in invalid.errors():
            name = "_".join(map(str, error["loc"])) or "settings"
            print(f"{name}: {error['msg']}", file=sys.stderr)
        return 2
    except (ValueError, OSError, ImportError) as error:
        print(error, file=sys.stderr)
        return 2
    options: dict[str, Any] = {
        "loop": "uvloop",
        "http": Protocol,  # httptools saves a millisecond, but does not limit the size of headers
        "ws": "none",
        "access_log": False,
        "log_config": None,
        "server_header": False,
        "timeout_keep_alive": settings.keep_alive_s,
        "timeout_graceful_shutdown": settings.shutdown_grace_s,
    }
    if settings.processes > 1:
        return workers.serve(settings, listener, **options)
    config = uvicorn.Config(app, settings.host, settings.port, **options)
    server = Server(config, app.state.gateway, settings.shutdown_delay_s)
    server.run([listener])
    return 0 if server.started else 1


if __name__ == "__main__":
    # Without waiting for threads of abandoned requests, which cannot be stopped.
    os._exit(main())

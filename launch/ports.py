"""Addresses and ports of the servers, checked before anything starts."""

import contextlib
import errno
import os
import socket
import sys
from collections.abc import Mapping

from launch.errors import LaunchError

LOCALHOST = "127.0.0.1"


def host_from_environment() -> str:
    """Return the numeric IPv4 or IPv6 address that HOST names, or 127.0.0.1.

    Names are resolved here because Triton's HTTP server takes only numbers. A value that does not
    resolve is ignored with a warning: conda's compilers set HOST to the machine's triple.
    """
    text = os.environ.get("HOST") or LOCALHOST
    try:
        found = socket.getaddrinfo(text.strip("[]"), None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        print(
            f"warning: HOST={text} is neither an address nor a known host name: it is ignored, and "
            f"the service listens on {LOCALHOST}",
            file=sys.stderr,
        )
        return LOCALHOST
    found.sort(key=lambda entry: entry[0] != socket.AF_INET)
    return str(found[0][4][0])


def port_from_environment(variable: str, default: int) -> int:
    """Return the port that an environment variable names.

    Raises:
        LaunchError: its value is not a port.
    """
    text = os.environ.get(variable) or str(default)
    if not (text.isascii() and text.isdigit() and 0 < int(text) < 2**16):
        raise LaunchError(f"{variable}={text} is not a port: set it to a number from 1 to 65535")
    return int(text)


def bracketed(host: str) -> str:
    """Return the host as written in `host:port`: IPv6 addresses in brackets."""
    return f"[{host}]" if ":" in host else host


def reachable(host: str) -> str:
    """Return an address that reaches a server bound to `host`, which may be a wildcard."""
    return {"0.0.0.0": LOCALHOST, "::": "::1"}.get(host, host)  # noqa: S104


def check_free(host: str, ports: Mapping[str, int]) -> None:
    """Make sure that every port can be bound.

    Args:
        host: numeric address that the service binds.
        ports: port of each environment variable that sets one.

    Raises:
        LaunchError: a port is in use, needs privileges or occurs twice, or `host` is not an address
            of this machine.
    """
    variables: dict[int, str] = {}
    for variable, port in ports.items():
        if port in variables:
            raise LaunchError(
                f"{variables[port]} and {variable} are both {port}: set different ports"
            )
        variables[port] = variable
        try:
            # Set by the servers too: a port in TIME_WAIT is free, a port with a listener is not.
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            both = host == "::" and socket.has_dualstack_ipv6()
            socket.create_server((host, port), family=family, dualstack_ipv6=both).close()
        except PermissionError as error:
            raise LaunchError(
                f"port {port} ({variable}) needs root: set {variable} to a port from 1024 up"
            ) from error
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise LaunchError(
                    f"port {port} on {host} is in use: stop the program that listens there, "
                    f"or set {variable} to a free port"
                ) from error
            raise LaunchError(
                f"HOST={host} is not an address of this machine: {os.strerror(error.errno or 0)}"
            ) from error


def free_ports(count: int) -> list[int]:
    """Return ports of 127.0.0.1 on which nothing listens at the moment."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server((LOCALHOST, 0))) for _ in range(count)]
        return [listener.getsockname()[1] for listener in sockets]

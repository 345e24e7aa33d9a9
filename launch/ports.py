"""Addresses that the children listen on: checked before anything starts."""

import contextlib
import errno
import os
import socket
from collections.abc import Mapping

from launch.errors import LaunchError


def host_from_environment(variable: str, default: str) -> str:
    """The address that an environment variable names, as four numbers.

    A name is looked up here, once: Triton's HTTP server takes numbers alone.

    Raises:
        LaunchError: it has no IPv4 address.
    """
    text = os.environ.get(variable) or default
    try:
        return str(socket.getaddrinfo(text, None, socket.AF_INET)[0][4][0])
    except (socket.gaierror, UnicodeError) as error:
        raise LaunchError(
            f"{variable}={text} is not an IPv4 address, nor the name of one: "
            "set it to 127.0.0.1, or to 0.0.0.0 to be reached from other machines"
        ) from error


def port_from_environment(variable: str, default: int) -> int:
    """The port that an environment variable names.

    Raises:
        LaunchError: it holds something else.
    """
    text = os.environ.get(variable) or str(default)
    if not (text.isascii() and text.isdigit() and 0 < int(text) < 2**16):
        raise LaunchError(f"{variable}={text} is not a port: set it to a number from 1 to 65535")
    return int(text)


def check_free(host: str, ports: Mapping[str, int]) -> None:
    """Make sure that every port can be listened on.

    Args:
        host: IPv4 address that the service binds.
        ports: the environment variable that sets a port -> the port.

    Raises:
        LaunchError: a port is taken, needs privileges, or stands there twice; or `host` is no
            address of this machine.
    """
    owners: dict[int, str] = {}
    for variable, port in ports.items():
        if port in owners:
            raise LaunchError(
                f"{owners[port]} and {variable} are both {port}: give each a port of its own"
            )
        owners[port] = variable
        try:
            # As the servers do: a port in TIME_WAIT is free, one that is listened on is not.
            socket.create_server((host, port)).close()
        except PermissionError as error:
            raise LaunchError(
                f"port {port} ({variable}) needs root: set {variable} to a port from 1024 up"
            ) from error
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise LaunchError(
                    f"port {port} on {host} is taken: stop the program that listens there, "
                    f"or set {variable} to a free port"
                ) from error
            raise LaunchError(
                f"HOST={host} cannot be listened on: {os.strerror(error.errno or 0)}"
            ) from error


def free_ports(count: int) -> list[int]:
    """Ports of 127.0.0.1 that nothing listens on at this moment."""
    with contextlib.ExitStack() as stack:
        address = ("127.0.0.1", 0)
        sockets = [stack.enter_context(socket.create_server(address)) for _ in range(count)]
        return [one.getsockname()[1] for one in sockets]

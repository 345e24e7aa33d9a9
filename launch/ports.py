"""Addresses that the children listen on: checked before anything starts."""

import contextlib
import errno
import os
import socket
from collections.abc import Mapping

from launch.errors import BadSetting, PortUnavailable


def port_from_environment(variable: str, default: int) -> int:
    """The port that an environment variable names.

    Raises:
        BadSetting: it holds something else.
    """
    text = os.environ.get(variable) or str(default)
    if not (text.isascii() and text.isdigit() and 0 < int(text) < 2**16):
        raise BadSetting(f"{variable}={text} is not a port: set it to a number from 1 to 65535")
    return int(text)


def check_free(host: str, ports: Mapping[str, int]) -> None:
    """Make sure that every port can be listened on.

    Args:
        host: address that the service binds.
        ports: the environment variable that sets a port -> the port.

    Raises:
        PortUnavailable: a port is taken, needs privileges, or stands there twice.
        BadSetting: `host` is no address of this machine.
    """
    owners: dict[int, str] = {}
    for variable, port in ports.items():
        if port in owners:
            raise PortUnavailable(
                f"{owners[port]} and {variable} are both {port}: give each a port of its own"
            )
        owners[port] = variable
        try:
            _bind(host, port).close()
        except PermissionError as error:
            raise PortUnavailable(
                f"port {port} ({variable}) needs root: set {variable} to a port from 1024 up"
            ) from error
        except socket.gaierror as error:
            raise BadSetting(f"HOST={host} is not an address: {error.strerror}") from error
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise PortUnavailable(
                    f"port {port} on {host} is taken: stop the program that listens there, "
                    f"or set {variable} to a free port"
                ) from error
            raise BadSetting(
                f"HOST={host} cannot be listened on: {error.strerror or error}"
            ) from error


def free_ports(count: int, host: str = "127.0.0.1") -> list[int]:
    """Ports that nothing listens on at this moment."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(_bind(host, 0)) for _ in range(count)]
        return [one.getsockname()[1] for one in sockets]


def _bind(host: str, port: int) -> socket.socket:
    family, kind, protocol, _, address = socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    one = socket.socket(family, kind, protocol)
    try:
        # As the servers do: a port in TIME_WAIT is free, one that is listened on is not.
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        one.bind(address)
        one.listen(1)
    except OSError:
        one.close()
        raise
    return one

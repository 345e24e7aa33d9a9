"""The command `flownet2`: flow of pairs, videos, folders and datasets, computed by a server."""

import io
import os
import signal
import sys
from typing import NoReturn

from flownet2.command.app import app
from flownet2.command.terminal import fail
from flownet2.errors import Error


def main() -> NoReturn:
    """Run the command.

    Exit status: 0 on success, 1 with one line on errors, 2 for wrong usage, 130 after Ctrl-C.
    """
    # A shell script ignores SIGINT in commands that it starts with `&`; Ctrl-C should end them too.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # names of files may be of any bytes
            stream.reconfigure(errors="surrogateescape")
    try:
        app(standalone_mode=True)
    except KeyboardInterrupt:
        fail("stopped", 130)
    except Error as error:
        fail(str(error))
    except BrokenPipeError:  # as in `flownet2 models | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:  # such as a full disk
        if error.errno is None:
            raise
        fail(f"{error.filename}: {error.strerror}" if error.filename else str(error))
    sys.exit(0)

"""Runs the command `flownet2`."""

import contextlib
import io
import sys
from dataclasses import dataclass
from unittest import mock

from flownet2.command import main


@dataclass(frozen=True)
class Ended:
    """How a command ended, and what it said."""

    returncode: int
    stdout: str
    stderr: str


def command(*arguments: object, server: str = "", **options: object) -> list[str]:
    """A command line; an option that is True is a flag."""
    line = [sys.executable, "-m", "flownet2", *map(str, arguments)]
    for name, value in (*options.items(), *([("server", server)] if server else ())):
        line += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    return line


def flownet2(*arguments: object, server: str = "", **options: object) -> Ended:
    """The command in this process, which saves the time of its start."""
    stdout, stderr = io.StringIO(), io.StringIO()
    line = command(*arguments, server=server, **options)[2:]
    with (
        mock.patch.object(sys, "argv", line),
        contextlib.redirect_stdout(stdout),
        contextlib.redirect_stderr(stderr),
    ):
        try:
            main()
        except SystemExit as ended:
            return Ended(int(ended.code or 0), stdout.getvalue(), stderr.getvalue())


def succeed(*arguments: object, server: str = "", **options: object) -> str:
    """Its standard output; on the other it says nothing where nobody watches."""
    ended = flownet2(*arguments, server=server, **options)
    assert (ended.returncode, ended.stderr) == (0, "")
    return ended.stdout


def fail(*arguments: object, server: str = "", **options: object) -> str:
    """The one line that it says."""
    ended = flownet2(*arguments, server=server, **options)
    assert ended.returncode == 1, ended.stderr
    assert ended.stderr.count("\n") == 1, ended.stderr
    return ended.stderr

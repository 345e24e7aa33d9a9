"""Runs the command `flownet2`, in this process or as one."""

import contextlib
import io
import sys
from dataclasses import dataclass
from unittest import mock

from flownet2.command import main


@dataclass(frozen=True)
class Ended:
    """Exit status and output of a command."""

    returncode: int
    stdout: str
    stderr: str


def command(*arguments: object, server: str = "", **options: object) -> list[str]:
    """Return a command line; an option that is True is a flag."""
    line = [sys.executable, "-m", "flownet2", *map(str, arguments)]
    for name, value in (*options.items(), *([("server", server)] if server else ())):
        line += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    return line


def flownet2(*arguments: object, server: str = "", **options: object) -> Ended:
    """Run the command in this process, which saves the time of its start."""
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
    """Return its standard output; stderr must be empty, as it is no terminal."""
    ended = flownet2(*arguments, server=server, **options)
    assert (ended.returncode, ended.stderr) == (0, "")
    return ended.stdout


def fail(*arguments: object, server: str = "", **options: object) -> str:
    """Return its error message, which must be a single line."""
    ended = flownet2(*arguments, server=server, **options)
    assert ended.returncode == 1, ended.stderr
    assert ended.stderr.count("\n") == 1, ended.stderr
    return ended.stderr

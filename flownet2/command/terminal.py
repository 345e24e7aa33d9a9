"""Output of the command: messages, tables and progress bars."""

import contextlib
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import NoReturn

import rich.console
import rich.progress
import rich.table

console = rich.console.Console(stderr=True, highlight=False, soft_wrap=True)
"""Standard error."""


def fail(message: str, status: int = 1) -> NoReturn:
    """Print an error as one line and end the command."""
    console.print(f"flownet2: {' '.join(message.split())}", markup=False)
    sys.exit(status)


def say(message: str) -> None:
    """Print a status line if standard error is a terminal."""
    if console.is_terminal:
        console.print(message, markup=False)


def warn(message: str) -> None:
    """Print a warning as one line."""
    console.print(f"flownet2: {' '.join(message.split())}", markup=False)


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table to standard output: framed on a terminal, else lines with tabs."""
    if not sys.stdout.isatty():
        for row in (columns, *rows):
            print(*row, sep="\t")
        return
    table = rich.table.Table(*columns)
    for row in rows:
        table.add_row(*row)
    rich.console.Console().print(table)


class Bar:
    """Progress bar with pairs, pairs per second and time left; nothing without a terminal."""

    def __init__(self, progress: rich.progress.Progress) -> None:
        self._progress = progress
        self._task = progress.add_task("", total=None)
        self.shown = not progress.disable

    def begin(self, name: str, pairs: int | None = None) -> None:
        """Show the name of the current source and, if given, set the expected number of pairs."""
        self._progress.update(self._task, description=name)
        if pairs is not None:
            self.expect(pairs)

    def expect(self, pairs: int) -> None:
        """Set the expected number of pairs."""
        self._progress.update(self._task, total=pairs)

    def advance(self) -> None:
        """Count one pair."""
        self._progress.advance(self._task)

    def warn(self, message: str) -> None:
        """Print a line above the bar."""
        warn(message)


class _Speed(rich.progress.ProgressColumn):
    """Pairs per second."""

    def render(self, task: rich.progress.Task) -> str:
        return f"{task.finished_speed or task.speed or 0:.1f} pairs/s"


@contextlib.contextmanager
def progress_bar() -> Iterator[Bar]:
    """Show a progress bar while the block runs."""
    columns = rich.progress
    with rich.progress.Progress(
        columns.TextColumn("{task.description}"),
        columns.BarColumn(),
        columns.MofNCompleteColumn(),
        _Speed(),
        columns.TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    ) as progress:
        yield Bar(progress)

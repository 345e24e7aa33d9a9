"""The typer application: all subcommands, in the order of the help."""

from typing import Annotated

import typer

from flownet2 import __version__
from flownet2.command.convert import convert
from flownet2.command.evaluate import evaluate
from flownet2.command.models import models
from flownet2.command.pair import pair
from flownet2.command.run import run
from flownet2.command.serve import serve
from flownet2.command.submit import submit
from flownet2.command.view import view

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"flownet2 {__version__}")
        raise typer.Exit


@app.callback()
def flownet2(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    """Compute optical flow with FlowNet 2.0 on a server. `flownet2 serve` starts a server."""


for command in (pair, run, view, convert, evaluate, submit, models, serve):
    app.command()(command)

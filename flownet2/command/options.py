"""Options that several subcommands share."""

from typing import Annotated

import typer

from flownet2.formats import FORMATS

Server = Annotated[
    str | None,
    typer.Option(
        metavar="URL[,URL…]",
        help="Gateways (http://host:port) or Tritons (grpc://host:port). Default: FLOWNET2_URL, "
        "else http://127.0.0.1:5003. Without a server there, a checkout starts its own.",
    ),
]
ModelName = Annotated[
    str | None,
    typer.Option("--model", help="Network to use. `flownet2 models` lists what is loaded."),
]
FormatName = Annotated[
    str | None,
    typer.Option(help=f"Format, if the suffix does not determine it: {', '.join(FORMATS)}."),
]

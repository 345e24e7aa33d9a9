"""`flownet2 pair`."""

from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from flownet2 import service
from flownet2.client import Client
from flownet2.command.options import FormatName, ModelName, Server
from flownet2.command.terminal import say
from flownet2.contract import MINIMUM_SIDE
from flownet2.formats import named_format, write_flow


def pair(
    first: Annotated[str, typer.Argument(metavar="A", help="The first image.")],
    second: Annotated[str, typer.Argument(metavar="B", help="The second image.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The file to write: .flo .npy .npz .pfm .png")
    ],
    format: FormatName = None,
    max_edge: Annotated[
        int | None,
        typer.Option(
            min=MINIMUM_SIDE,
            help="Reduce images to this longer edge, in pixels; the flow has that size.",
        ),
    ] = None,
    server: Server = None,
    model: ModelName = None,
) -> None:
    """Compute the flow between two images.

    Example: flownet2 pair a.png b.png -o flow.flo
    """
    named_format(output.suffix, format)
    with service.server(server, say) as url, Client(url, model=model) as client:
        flow = client.flow(first, second, max_edge=max_edge).flow
    write_flow(output, flow, format)
    lengths = np.hypot(flow[..., 0], flow[..., 1])
    height, width = lengths.shape
    print(
        f"{output}: {width}x{height}, mean motion {lengths.mean():.2f} pixels, "
        f"largest {lengths.max():.2f}"
    )

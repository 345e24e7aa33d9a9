"""`flownet2 convert`."""

from pathlib import Path
from typing import Annotated

import typer

from flownet2.command.options import FormatName
from flownet2.formats import read_flow, write_flow


def convert(
    source: Annotated[Path, typer.Argument(metavar="IN", help="A flow: .flo .npy .npz .pfm .png")],
    target: Annotated[
        Path, typer.Argument(metavar="OUT", help="The file to write; .png is in colours.")
    ],
    format: FormatName = None,
) -> None:
    """Convert a flow to another format.

    Example: flownet2 convert flow.flo flow.png --format kitti
    """
    write_flow(target, read_flow(source), format)

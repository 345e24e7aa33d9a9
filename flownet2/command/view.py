"""`flownet2 view`."""

import os
import sys
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import typer

from flownet2.command.terminal import fail
from flownet2.formats import known, read_flow


def view(
    flow: Annotated[Path, typer.Argument(metavar="FLOW", help="A flow: .flo .npy .npz .pfm .png")],
    kind: Annotated[
        Literal["colours", "arrows", "warp"],
        typer.Option(
            "--as",
            help="Colours with their wheel, arrows, or the second frame warped onto the first.",
        ),
    ] = "colours",
    image: Annotated[
        Path | None,
        typer.Option(help="The first frame, to draw arrows on, or the second, for --as warp."),
    ] = None,
    max_flow: Annotated[
        float | None,
        typer.Option(min=0.1, help="Flow of the strongest colours, in pixels; else the longest."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="A PNG to write; else a window, if there is a display."
        ),
    ] = None,
) -> None:
    """Show a flow.

    Example: flownet2 view flow.flo --as arrows --image a.png
    """
    from PIL import Image  # noqa: PLC0415

    from flownet2 import view as views  # noqa: PLC0415
    from flownet2.images import Frame  # noqa: PLC0415

    read = read_flow(flow)
    pixels = None if image is None else Frame(image, str(image)).pixels()
    if pixels is not None and pixels.shape[:2] != read.shape[:2]:
        fail(f"{image} and {flow} differ in size")
    if kind == "warp":
        if pixels is None:
            raise typer.BadParameter("--as warp needs the second frame: --image")
        picture = views.warped(read, pixels)
    elif kind == "arrows":
        picture = views.arrows(read, pixels)
    else:
        lengths = np.hypot(read[..., 0], read[..., 1])[known(read)]
        picture = views.coloured(read, max_flow or float(lengths.max(initial=0.1)))
    shown = Image.fromarray(picture)
    windows = sys.platform != "linux" or {"DISPLAY", "WAYLAND_DISPLAY"} & os.environ.keys()
    if output is None and windows:
        shown.show(title=str(flow))
        return
    target = output or flow.with_name(f"{flow.stem}_{kind}.png")
    shown.save(target)
    print(target)

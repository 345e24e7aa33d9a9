"""`flownet2 view`."""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
import typer

from flownet2.command.terminal import fail
from flownet2.formats import read_flow

if TYPE_CHECKING:
    from flownet2.convert import FlowFile
    from flownet2.formats import Flow
    from flownet2.images import Pixels


def view(
    flow: Annotated[
        str,
        typer.Argument(
            metavar="FLOW", help="A flow file, or a folder or pattern for a contact sheet."
        ),
    ],
    kind: Annotated[
        Literal["colours", "arrows", "warp"],
        typer.Option(
            "--as",
            help="Colours with their legend, arrows, or the second frame warped onto the first.",
        ),
    ] = "colours",
    image: Annotated[
        Path | None,
        typer.Option(help="The first frame (arrows, --overlay) or the second frame (warp)."),
    ] = None,
    overlay: Annotated[
        bool, typer.Option("--overlay", help="Draw the colours over the first frame (--image).")
    ] = False,
    truth: Annotated[
        Path | None,
        typer.Option(help="The ground truth: draw the errors, in KITTI's colours."),
    ] = None,
    index: Annotated[
        int | None, typer.Option(min=0, help="Show one flow of a folder, by its number from 0.")
    ] = None,
    max_flow: Annotated[
        float | None,
        typer.Option(
            min=0.1, help="Motion in the strongest colours, in pixels. Default: the longest."
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="PNG file to write. Default: a window, if there is a display."
        ),
    ] = None,
) -> None:
    """Show a flow, the errors of a flow, or a folder of flows.

    Examples:

    flownet2 view flow.flo --as arrows --image a.png

    flownet2 view flow.flo --truth gt.flo -o errors.png

    flownet2 view flows/ -o sheet.png
    """
    from PIL import Image  # noqa: PLC0415

    from flownet2.convert import find_flows  # noqa: PLC0415

    files = find_flows([flow])
    if index is not None:
        if index >= len(files):
            fail(f"{flow} has {len(files)} flows: --index is from 0 to {len(files) - 1}")
        files = files[index : index + 1]
    path = files[0].path
    suffix: str = "error" if truth else kind
    if len(files) > 1:
        if kind != "colours" or image or truth:
            raise typer.BadParameter("a contact sheet is of colours: give one flow, or --index")
        picture = _sheet(files, max_flow)
        path, suffix = (Path(flow) if Path(flow).is_dir() else path.parent).resolve(), "sheet"
    else:
        read = files[0].read()
        if truth is not None:
            picture = _errors(read, files[0].path, truth)
        else:
            picture = _single(read, kind, image, overlay, max_flow)
    shown = Image.fromarray(picture)
    windows = sys.platform != "linux" or {"DISPLAY", "WAYLAND_DISPLAY"} & os.environ.keys()
    if output is None and windows:
        shown.show(title=flow)
        return
    target = output or path.with_name(f"{path.stem}_{suffix}.png")
    shown.save(target, "PNG")
    print(target)


def _single(
    flow: "Flow",
    kind: Literal["colours", "arrows", "warp"],
    image: Path | None,
    overlay: bool,
    max_flow: float | None,
) -> "Pixels":
    """Draw one flow."""
    from flownet2 import view as views  # noqa: PLC0415
    from flownet2.formats import known  # noqa: PLC0415
    from flownet2.images import Frame  # noqa: PLC0415

    pixels = None if image is None else Frame(image, str(image)).pixels()
    if pixels is not None and pixels.shape[:2] != flow.shape[:2]:
        fail(f"{image} and the flow differ in size")
    if pixels is None and (kind == "warp" or overlay):
        needed = "--as warp needs the second" if kind == "warp" else "--overlay needs the first"
        raise typer.BadParameter(f"{needed} frame: --image")
    if kind == "warp" and pixels is not None:
        return views.warped(flow, pixels)
    if kind == "arrows":
        return views.arrows(flow, pixels)
    lengths = np.hypot(flow[..., 0], flow[..., 1])[known(flow)]
    maximum = max_flow or float(lengths.max(initial=0.1))
    return views.coloured(flow, maximum, pixels if overlay else None)


def _errors(flow: "Flow", path: Path, truth: Path) -> "Pixels":
    """Draw the errors of a flow against a file of ground truth."""
    from flownet2 import view as views  # noqa: PLC0415
    from flownet2.evaluate import compare_files  # noqa: PLC0415
    from flownet2.measures import nearest_truth  # noqa: PLC0415

    errors = compare_files(path, truth)
    true_flow = read_flow(truth)
    if true_flow.shape != flow.shape:
        true_flow = nearest_truth(np.nan_to_num(flow), true_flow)
    caption = f"EPE {errors.mean() or 0:.2f} px, Fl {errors.fl_all or 0:.2%}"
    return views.error_map(flow, true_flow, caption)


def _sheet(files: "list[FlowFile]", max_flow: float | None) -> "Pixels":
    """Draw a contact sheet of flows in colours of one scale, evenly spaced if there are many."""
    from flownet2 import view as views  # noqa: PLC0415
    from flownet2.colours import colours  # noqa: PLC0415
    from flownet2.convert import longest  # noqa: PLC0415

    if len(files) > views.SHEET_PICTURES:
        chosen = np.linspace(0, len(files) - 1, views.SHEET_PICTURES).round().astype(int)
        print(f"{views.SHEET_PICTURES} of {len(files)} flows, evenly spaced", file=sys.stderr)
        files = [files[index] for index in chosen]
    scale = max_flow or longest(files)
    return views.contact_sheet([(file.name, colours(file.read(), scale)) for file in files])

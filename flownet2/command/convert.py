"""`flownet2 convert`."""

from pathlib import Path
from typing import Annotated

import typer

from flownet2.command.options import FormatName
from flownet2.command.terminal import progress_bar
from flownet2.formats import named_format


def convert(
    paths: Annotated[
        list[str],
        typer.Argument(
            metavar="IN... OUT",
            help="Flow files, folders of them or patterns; then the file or folder to write. "
            "A .png file is a picture in colours, a .mp4 file a video of all flows.",
        ),
    ],
    format: FormatName = None,
    max_flow: Annotated[
        float | None,
        typer.Option(
            min=0.1,
            help="Motion in the strongest colours, in pixels. Default: the longest of all flows.",
        ),
    ] = None,
) -> None:
    """Convert flow files to another format, to pictures or to a video.

    Examples:

    flownet2 convert flow.flo flow.png --format kitti

    flownet2 convert flows/ pictures/ --format png --max-flow 20

    flownet2 convert 'flows/*.flo' flows.mp4
    """
    from flownet2 import convert as conversion  # noqa: PLC0415

    *sources, out = paths
    if not sources:
        raise typer.BadParameter("give at least one source and the file or folder to write")
    target = Path(out)
    files = conversion.find_flows(sources)
    with progress_bar() as bar:
        bar.begin("convert", len(files))
        if target.suffix.lower() == conversion.VIDEO:
            conversion.write_video(files, target, max_flow, bar.advance)
        elif files[0].path == Path(sources[0]) and len(files) == 1 and not target.is_dir():
            to = named_format(target.suffix, format)
            conversion.write_file(files[0].path, target, to, max_flow)
            return
        elif format is None:
            raise typer.BadParameter(f"{out} is a folder for several flows: give their --format")
        else:
            to = named_format("", format)
            conversion.write_files(files, target, to, max_flow, bar.advance)
    print(f"{target}: {len(files)} flows")

"""`flownet2 run`."""

import asyncio
from typing import Annotated, Literal

import typer

from flownet2 import service
from flownet2.client import AsyncClient, Direction
from flownet2.command.options import ModelName, Server
from flownet2.command.terminal import fail, progress_bar, say
from flownet2.contract import MINIMUM_SIDE
from flownet2.sources import Selection, find


def run(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="SOURCE...",
            help="Video files, folders or globs of frames, lists of pairs (.txt, a line each: "
            "two images and maybe a name for the output), camera:0. "
            "Also URLs such as s3://bucket/video.mp4.",
        ),
    ],
    output: Annotated[
        str, typer.Option("--output", "-o", metavar="DIR", help="Folder or URL for the results.")
    ],
    format: Annotated[
        str,
        typer.Option(
            help="One or several, with commas: flo npy npz pfm kitti png jpg hdf5 flo5 mp4."
        ),
    ] = "flo",
    step: Annotated[int, typer.Option(min=1, help="Distance of the two frames of a pair.")] = 1,
    start: Annotated[int, typer.Option(min=0, help="The first frame to use.")] = 0,
    end: Annotated[int | None, typer.Option(min=0, help="The frame to stop before.")] = None,
    direction: Direction = "forward",
    occlusion: Annotated[
        bool, typer.Option("--occlusion", help="Also write masks of what the second frame hides.")
    ] = False,
    max_edge: Annotated[
        int | None,
        typer.Option(
            min=MINIMUM_SIDE, help="Shrink frames to this longer edge; the flow has that size."
        ),
    ] = None,
    bound: Annotated[
        float, typer.Option(min=0.1, help="Flow at the ends of the range of jpg, in pixels.")
    ] = 20.0,
    max_flow: Annotated[
        float | None,
        typer.Option(min=0.1, help="Flow of the strongest colours of png and mp4, in pixels."),
    ] = None,
    side_by_side: Annotated[
        bool, typer.Option("--side-by-side", help="Show the frames beside the flow in mp4.")
    ] = False,
    jobs: Annotated[
        int | None, typer.Option(min=1, help="Requests at a time; by default 8 per server.")
    ] = None,
    shard: Annotated[
        str | None,
        typer.Option(metavar="I/N", help="Process only every N-th source, from the I-th (0…)."),
    ] = None,
    on_error: Annotated[
        Literal["stop", "skip"],
        typer.Option(help="Stop at an error, or record it in errors.csv and go on."),
    ] = "stop",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace results of another run.")
    ] = False,
    server: Server = None,
    model: ModelName = None,
) -> None:
    """Compute the flow of videos, folders of frames and lists of pairs.

    Writes DIR/<source>/<number>.<suffix>, index.csv beside them, and DIR/manifest.json.
    Started again, it computes what is missing.

    Examples:

    flownet2 run film.mp4 -o out --format flo,mp4

    flownet2 run 'frames/*.png' -o out --direction both --occlusion

    flownet2 run s3://clips/ -o s3://flows/ --shard 3/16 --server grpc://triton:8001
    """
    from flownet2 import run as runs  # noqa: PLC0415
    from flownet2.writers import Options  # noqa: PLC0415

    options = Options(_formats(format), direction, occlusion, bound, max_flow, side_by_side)
    part = _shard(shard)
    found = find(sources)
    with service.server(server, say) as url, progress_bar() as bar:
        plan = runs.Plan(
            Selection(step, start, end, max_edge),
            options,
            jobs or 8 * len(url.split(",")),
            on_error,
            overwrite,
            part,
        )

        async def work() -> runs.Totals:
            patience = runs.PATIENCE_SECONDS
            async with AsyncClient(
                url, model=model, timeout=2 * patience, patience=patience
            ) as client:
                return await runs.run(found, output, client, plan, bar)

        try:
            totals = asyncio.run(work())
        except runs.RunError as error:
            fail(str(error))
        except KeyboardInterrupt:
            fail("stopped: the same command goes on from here", 130)
    say(
        f"{totals.computed} pairs computed, {totals.found} were there, "
        f"{len(totals.skipped)} errors: {output}"
    )


def _formats(text: str) -> tuple[str, ...]:
    from flownet2.writers import NAMES  # noqa: PLC0415

    formats = tuple(dict.fromkeys(name.strip() for name in text.split(",")))
    unknown = [name for name in formats if name not in NAMES]
    if unknown:
        raise typer.BadParameter(f"--format: {unknown[0]!r} is none of {', '.join(NAMES)}")
    if {"png", "kitti"} <= set(formats):
        raise typer.BadParameter("--format: png and kitti have one suffix; choose one of them")
    if {"hdf5", "flo5"} & set(formats):
        try:
            import h5py  # noqa: F401, PLC0415
        except ImportError:
            raise typer.BadParameter(
                "--format: hdf5 and flo5 need h5py: pip install 'flownet2-triton[hdf5]'"
            ) from None
    return formats


def _shard(text: str | None) -> tuple[int, int]:
    index, _, count = (text or "0/1").partition("/")
    if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise typer.BadParameter(f"--shard: {text!r} is not I/N with I from 0 to N-1")
    return int(index), int(count)

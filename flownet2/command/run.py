"""`flownet2 run`."""

import asyncio
import re
import time
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from flownet2 import service
from flownet2.client import AsyncClient, Direction
from flownet2.command.options import ModelName, Server
from flownet2.command.terminal import fail, progress_bar, say, warn
from flownet2.contract import MINIMUM_SIDE

if TYPE_CHECKING:
    from flownet2.pairs import Position

Output = Annotated[
    str,
    typer.Option("--output", "-o", metavar="DIR", help="Folder or URL for the results."),
]


def run(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="SOURCE...",
            help="Videos, images, folders with any of them, patterns (*.png, %05d.png), lists of "
            "pairs or of sources (.txt), URLs (s3://, http://, rtsp://), camera:0, or - for "
            "standard input.",
        ),
    ],
    output: Output,
    format: Annotated[
        str | None,
        typer.Option(
            metavar="FORMAT[,FORMAT…]",
            help="flo npy npz pfm kitti png jpg hdf5 flo5 mp4. Default: flo, or that of --names.",
        ),
    ] = None,
    step: Annotated[
        int, typer.Option(min=1, help="Distance between the two frames of a pair.")
    ] = 1,
    start: Annotated[
        str,
        typer.Option(metavar="N|SECONDSs", help="First frame: a number (300) or a time (12.5s)."),
    ] = "0",
    end: Annotated[
        str | None,
        typer.Option(metavar="N|SECONDSs", help="Frame to stop before: a number or a time."),
    ] = None,
    fps: Annotated[
        float | None,
        typer.Option(min=0.001, help="Resample videos to this rate, in frames per second."),
    ] = None,
    direction: Direction = "forward",
    occlusion: Annotated[
        bool,
        typer.Option("--occlusion", help="Also write masks of the pixels hidden in frame 2."),
    ] = False,
    max_edge: Annotated[
        int | None,
        typer.Option(
            min=MINIMUM_SIDE,
            metavar="PIXELS",
            help="Shrink frames until the longer edge has this length. The flow has that size.",
        ),
    ] = None,
    short_edge: Annotated[
        int | None,
        typer.Option(
            min=MINIMUM_SIDE,
            metavar="PIXELS",
            help="Shrink frames until the shorter edge has this length.",
        ),
    ] = None,
    deinterlace: Annotated[
        bool, typer.Option("--deinterlace", help="Deinterlace videos (bwdif).")
    ] = False,
    names: Annotated[
        str | None,
        typer.Option(
            metavar="PATTERN|PRESET",
            help="Names of the files: a pattern of {number:06}, {ordinal:05} (from 1), {stem} and "
            "{axis}, or mmaction, tsn, raft.",
        ),
    ] = None,
    bound: Annotated[
        float,
        typer.Option(min=0.1, metavar="PIXELS", help="Flow in pixels at the ends of jpg's range."),
    ] = 20.0,
    max_flow: Annotated[
        float | None,
        typer.Option(
            min=0.1, metavar="PIXELS", help="Motion in the strongest colours of png and mp4."
        ),
    ] = None,
    side_by_side: Annotated[
        bool, typer.Option("--side-by-side", help="Show the frames beside the flow in mp4.")
    ] = False,
    jobs: Annotated[
        int | None,
        typer.Option(min=1, help="Number of concurrent requests. Default: 8 per server."),
    ] = None,
    shard: Annotated[
        str | None,
        typer.Option(
            metavar="I/N",
            help="Process part I of N, from 0. The name of a source decides its part.",
        ),
    ] = None,
    on_error: Annotated[
        Literal["stop", "skip"],
        typer.Option(help="Stop at an error, or record it in errors.csv and continue."),
    ] = "stop",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the results of another run.")
    ] = False,
    server: Server = None,
    model: ModelName = None,
) -> None:
    """Compute the flow of videos, folders of frames and lists of pairs.

    Writes DIR/<source>/<number>.<suffix>, index.csv beside them, and DIR/manifest.json. The same
    command continues a run that was interrupted.

    Examples:

    flownet2 run film.mp4 -o out --format flo,mp4

    flownet2 run dataset/ -o out --names mmaction --short-edge 256

    flownet2 run 'frames/*.png' -o out --direction both --occlusion

    flownet2 run s3://clips/ -o s3://flows/ --shard 3/16 --server grpc://triton:8001
    """
    from flownet2 import run as runs  # noqa: PLC0415
    from flownet2.memory import keep_freed_memory  # noqa: PLC0415
    from flownet2.pairs import Selection  # noqa: PLC0415
    from flownet2.sources import find  # noqa: PLC0415
    from flownet2.video import is_live  # noqa: PLC0415
    from flownet2.writers import DEFAULT_NAMES, PRESETS, Options, check_pattern  # noqa: PLC0415

    if max_edge and short_edge:
        raise typer.BadParameter("give --max-edge or --short-edge, not both")
    pattern, default_format = PRESETS.get(names or "", (names or DEFAULT_NAMES, "flo"))
    check_pattern(pattern)
    options = Options(
        _formats(format or default_format),
        direction,
        occlusion,
        bound,
        max_flow,
        side_by_side,
        pattern,
    )
    selection = Selection(
        step,
        _position("--start", start),
        _position("--end", end) if end is not None else None,
        max_edge,
        short_edge,
        fps,
        deinterlace,
    )
    part = _shard(shard)
    found = find(sources, warn, exclude=[output])
    keep_freed_memory()
    began = time.monotonic()
    with service.server(server, say) as url, progress_bar() as bar:
        plan = runs.Plan(
            selection, options, jobs or 8 * len(url.split(",")), on_error, overwrite, part
        )

        async def work() -> runs.Totals:
            patience = runs.PATIENCE_SECONDS
            async with AsyncClient(
                url, model=model, timeout=2 * patience, patience=patience
            ) as client:
                return await runs.run(found, output, client, plan, bar)

        try:
            totals = asyncio.run(work())
        except KeyboardInterrupt:
            live = any(is_live(source.path) for source in found.values())
            fail("stopped" if live else "stopped. The same command continues from here", 130)
    seconds = time.monotonic() - began
    rate = f", {totals.computed / seconds:.1f} pairs/s" if totals.computed else ""
    parts = [f"{_count(totals.computed, 'pair')} computed in {seconds:.1f} s{rate}"]
    if totals.found:
        parts.append(f"{totals.found} were there already")
    if totals.skipped:
        parts.append(f"{_count(len(totals.skipped), 'error')} skipped, listed in errors.csv")
    print(f"{output}: {_count(totals.sources, 'source')}, {'; '.join(parts)}")
    if totals.sources and not totals.computed and not totals.found:
        fail("no pair of frames could be computed")


def _position(option: str, text: str) -> "Position":
    from flownet2.pairs import Position  # noqa: PLC0415

    if text.isdecimal():
        return Position(int(text))
    if re.fullmatch(r"\d+(\.\d*)?s", text):
        return Position(float(text[:-1]), seconds=True)
    raise typer.BadParameter(f"{option}: {text!r} is neither a frame (300) nor a time (12.5s)")


def _formats(text: str) -> tuple[str, ...]:
    from flownet2.writers import FORMAT_NAMES  # noqa: PLC0415

    formats = tuple(dict.fromkeys(name.strip() for name in text.split(",")))
    unknown = [name for name in formats if name not in FORMAT_NAMES]
    if unknown:
        raise typer.BadParameter(
            f"--format: {unknown[0]!r} is not one of {', '.join(FORMAT_NAMES)}"
        )
    if {"png", "kitti"} <= set(formats):
        raise typer.BadParameter(
            "--format: png and kitti share the suffix .png: choose one of them"
        )
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


def _count(number: int, noun: str) -> str:
    """Return a number with its noun in singular or plural."""
    return f"{number} {noun}{'' if number == 1 else 's'}"

"""The command `flownet2`: the flow of pairs, videos, folders and datasets, from a server."""

import asyncio
import contextlib
import os
import runpy
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NoReturn

import numpy as np
import rich.console
import rich.progress
import rich.table
import typer

from flownet2 import service
from flownet2.client import AsyncClient, Client, Direction, FlowError
from flownet2.contract import MINIMUM_SIDE
from flownet2.errors import Error
from flownet2.formats import FORMATS, known, named_format, read_flow, write_flow
from flownet2.manifest import ManifestError
from flownet2.service import NoServer
from flownet2.sources import Selection, SourceError, find

if TYPE_CHECKING:
    from flownet2.evaluate import Errors

app = typer.Typer(
    help="Optical flow with FlowNet 2.0, from a server: `flownet2 serve` starts one.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
errors = rich.console.Console(stderr=True, highlight=False, soft_wrap=True)

Server = Annotated[
    str | None,
    typer.Option(
        metavar="URL[,URL…]",
        help="Gateways (http://host:port) or Tritons (grpc://host:port). Default: FLOWNET2_URL, "
        "else http://127.0.0.1:5003, else one is started if this is a checkout.",
    ),
]
ModelName = Annotated[
    str | None,
    typer.Option("--model", help="The network to use, of those that `flownet2 models` lists."),
]
FormatName = Annotated[
    str | None, typer.Option(help=f"Format, if the suffix does not tell: {', '.join(FORMATS)}.")
]


def main() -> NoReturn:
    """Run the command; exit status 1 with one line on errors, 2 for wrong usage."""
    # A script that starts it with `&` has SIGINT ignored, and its own Ctrl-C is to end this too.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        app(standalone_mode=True)
    except KeyboardInterrupt:
        fail("stopped", 130)
    except (Error, FlowError, NoServer, SourceError, ManifestError, ValueError) as error:
        fail(str(error))
    except OSError as error:
        named = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        fail(named)
    sys.exit(0)


def fail(message: str, status: int = 1) -> NoReturn:
    """End the command with a line that says why."""
    errors.print(f"flownet2: {' '.join(message.split())}", markup=False)
    sys.exit(status)


def say(message: str) -> None:
    """A line for people, where somebody watches."""
    if errors.is_terminal:
        errors.print(message, markup=False)


@app.command()
def pair(
    first: Annotated[str, typer.Argument(metavar="A", help="The first image.")],
    second: Annotated[str, typer.Argument(metavar="B", help="The second image.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The file to write: .flo .npy .npz .pfm .png")
    ],
    format: FormatName = None,
    server: Server = None,
    model: ModelName = None,
) -> None:
    """Compute the flow between two images.

    Example: flownet2 pair a.png b.png -o flow.flo
    """
    named_format(output.suffix, format)
    with service.server(server, say) as url, Client(url, model=model) as client:
        flow = client.flow(first, second).flow
    write_flow(output, flow, format)
    lengths = np.hypot(flow[..., 0], flow[..., 1])
    height, width = lengths.shape
    print(
        f"{output}: {width}x{height}, mean motion {lengths.mean():.2f} pixels, "
        f"largest {lengths.max():.2f}"
    )


@app.command()
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
    with service.server(server, say) as url, _bar() as bar:
        plan = runs.Plan(
            Selection(step, start, end, max_edge),
            options,
            jobs or 8 * len(url.split(",")),
            on_error,
            overwrite,
            part,
        )

        async def work() -> runs.Totals:
            async with AsyncClient(url, model=model, patience=runs.PATIENCE_SECONDS) as client:
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


class _Bar:
    """A bar of pairs, frames a second and time left; silent where nobody watches."""

    def __init__(self, progress: rich.progress.Progress) -> None:
        self._progress = progress
        self._task: rich.progress.TaskID | None = None

    def begin(self, name: str, pairs: int | None) -> None:
        if self._task is not None:
            self._progress.remove_task(self._task)
        self._task = self._progress.add_task(name, total=pairs)

    def advance(self) -> None:
        if self._task is not None:
            self._progress.advance(self._task)

    def say(self, message: str) -> None:
        errors.print(message, markup=False)


class _Speed(rich.progress.ProgressColumn):
    """Frames a second."""

    def render(self, task: rich.progress.Task) -> str:
        return f"{task.finished_speed or task.speed or 0:.1f} frames/s"


@contextlib.contextmanager
def _bar() -> Iterator[_Bar]:
    columns = rich.progress
    with rich.progress.Progress(
        columns.TextColumn("{task.description}"),
        columns.BarColumn(),
        columns.MofNCompleteColumn(),
        _Speed(),
        columns.TimeRemainingColumn(),
        console=errors,
        disable=not errors.is_terminal,
    ) as progress:
        yield _Bar(progress)


@app.command()
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


@app.command()
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


@app.command()
def evaluate(
    paths: Annotated[
        list[Path],
        typer.Argument(
            metavar="PREDICTION TRUTH | DIR", help="Two flows, or the folder of a dataset."
        ),
    ],
    dataset: Annotated[
        Literal["sintel", "kitti", "middlebury", "chairs", "things"] | None,
        typer.Option(help="The dataset in DIR."),
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Requests at a time.")] = 8,
    server: Server = None,
    model: ModelName = None,
) -> None:
    """Measure the errors of a flow file, or of a server on a benchmark.

    Examples:

    flownet2 evaluate flow.flo gt.flo

    flownet2 evaluate --dataset sintel MPI-Sintel-complete/
    """
    from flownet2 import evaluate as evaluation  # noqa: PLC0415

    if len(paths) != (1 if dataset else 2):
        raise typer.BadParameter("give two flows, or one folder and --dataset")
    if dataset is None:
        errors_of_files = evaluation.Errors()
        errors_of_files.add(read_flow(paths[0]), read_flow(paths[1]))
        _print_errors({str(paths[0]): errors_of_files}, None)
        return
    samples = list(evaluation.DATASETS[dataset](paths[0]))
    if not samples:
        fail(f"{paths[0]} is not laid out as {dataset}: no pair with true flow is in it")
    with service.server(server, say) as url, _bar() as bar:
        bar.begin(dataset, len(samples))

        async def work() -> tuple[dict[str, evaluation.Errors], str | None]:
            async with AsyncClient(url, model=model) as client:
                network = (await client.model()).network
                return await evaluation.evaluate(samples, client, jobs, bar.advance), network

        found, network = asyncio.run(work())
    _print_errors(found, network)


def _print_errors(found: "dict[str, Errors]", network: str | None) -> None:
    """A table of errors, and beside it the paper's figures of that network, if there are any."""
    from flownet2.evaluate import PAPER, PAPER_FIGURES, SPEEDS  # noqa: PLC0415

    paper = {
        name: PAPER_FIGURES[name, network] for name in found if (name, network) in PAPER_FIGURES
    }
    table = rich.table.Table("", "pairs", "EPE", "Fl-all", *SPEEDS, "occluded")
    if paper:
        table.add_column("paper EPE")
        table.add_column("paper Fl-all")
    for name, errors_of in found.items():
        kinds = [errors_of.mean(kind) for kind in (*SPEEDS, "occluded")]
        row = [name, str(errors_of.pairs), _pixels(errors_of.mean()), _percent(errors_of.fl_all)]
        row += [_pixels(one) for one in kinds]
        if paper:
            epe, fl_all = paper.get(name, (None, None))
            row += [_pixels(epe), _percent(fl_all)]
        table.add_row(*row)
    console = rich.console.Console()
    console.print(table)
    if paper:
        console.print(f"Paper: {network} in {PAPER}.")


def _pixels(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.2f} %"


@app.command()
def models(server: Server = None) -> None:
    """List the networks that a server has loaded, and where their weights are from."""
    with service.server(server, say) as url, Client(url) as client:
        found = client.models()
    table = rich.table.Table("name", "network", "parameters", "weights", "licence")
    for one in found:
        table.add_row(
            one.name,
            one.network,
            f"{one.parameters:,}" if one.parameters else "",
            one.weights_source,
            one.weights_license,
        )
    rich.console.Console().print(table)


@app.command()
def serve() -> None:
    """Run Triton and the gateway of this checkout until Ctrl-C, as `make serve` does."""
    if not service.is_checkout():
        fail("no server is installed here: run `make serve` in a checkout of the project")
    sys.argv = ["launch"]
    runpy.run_module("launch", run_name="__main__", alter_sys=True)

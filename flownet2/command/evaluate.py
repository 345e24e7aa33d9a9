"""`flownet2 evaluate`."""

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from flownet2 import service
from flownet2.client import AsyncClient
from flownet2.command.options import ModelName, Server
from flownet2.command.terminal import fail, print_table, progress_bar, say
from flownet2.formats import read_flow

if TYPE_CHECKING:
    from flownet2.evaluate import Errors


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
    with service.server(server, say) as url, progress_bar() as bar:
        bar.begin(dataset, len(samples))

        async def work() -> tuple[dict[str, evaluation.Errors], str | None]:
            async with AsyncClient(url, model=model) as client:
                network = (await client.model()).network
                return await evaluation.evaluate(samples, client, jobs, bar.advance), network

        found, network = asyncio.run(work())
    _print_errors(found, network)


def _print_errors(found: "dict[str, Errors]", network: str | None) -> None:
    """Print a table of errors, with the paper's figures of that network beside them if any."""
    from flownet2.evaluate import PAPER, PAPER_FIGURES, SPEEDS  # noqa: PLC0415

    paper = {
        name: PAPER_FIGURES[name, network] for name in found if (name, network) in PAPER_FIGURES
    }
    columns = ["", "pairs", "EPE", "Fl-all", *SPEEDS, "occluded"]
    if paper:
        columns += ["paper EPE", "paper Fl-all"]
    rows = []
    for name, measured in found.items():
        means = [measured.mean(kind) for kind in (*SPEEDS, "occluded")]
        row = [name, str(measured.pairs), _pixels(measured.mean()), _percent(measured.fl_all)]
        row += [_pixels(mean) for mean in means]
        if paper:
            epe, fl_all = paper.get(name, (None, None))
            row += [_pixels(epe), _percent(fl_all)]
        rows.append(row)
    print_table(columns, rows)
    if paper:
        print(f"Paper: {network} in {PAPER}.")


def _pixels(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.2f} %"

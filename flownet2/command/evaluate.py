"""`flownet2 evaluate`."""

import asyncio
import csv
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from flownet2 import service
from flownet2.client import AsyncClient
from flownet2.command.options import ModelName, Server
from flownet2.command.terminal import fail, print_table, progress_bar, say
from flownet2.datasets import DATASETS, samples

if TYPE_CHECKING:
    from flownet2.evaluate import Errors


def evaluate(
    paths: Annotated[
        list[Path],
        typer.Argument(
            metavar="PREDICTION TRUTH | DIR", help="Two flow files, or the folder of a dataset."
        ),
    ],
    dataset: Annotated[
        str | None, typer.Option(help=f"The dataset in DIR: {', '.join(DATASETS)}.")
    ] = None,
    each: Annotated[
        bool, typer.Option("--each", help="Also print a row for each sequence.")
    ] = False,
    format: Annotated[
        Literal["table", "json", "csv"], typer.Option(help="Format of the results.")
    ] = "table",
    jobs: Annotated[int, typer.Option(min=1, help="Number of concurrent requests.")] = 8,
    server: Server = None,
    model: ModelName = None,
) -> None:
    """Measure the errors of a flow file, or of a server on a dataset with ground truth.

    Pixels without a prediction count as wrong. If there are any, the exit status is 1.

    Examples:

    flownet2 evaluate flow.flo gt.flo

    flownet2 evaluate --dataset sintel MPI-Sintel-complete/ --each --format csv
    """
    from flownet2 import evaluate as evaluation  # noqa: PLC0415

    if len(paths) != (1 if dataset else 2):
        raise typer.BadParameter("give two flow files, or one folder and --dataset")
    network = None
    if dataset is None:
        prediction, truth = paths
        rows = {(str(prediction), ""): evaluation.compare_files(prediction, truth)}
    elif dataset not in DATASETS:
        raise typer.BadParameter(f"--dataset: {dataset!r} is none of {', '.join(DATASETS)}")
    else:
        pairs = samples(dataset, paths[0])
        with service.server(server, say) as url, progress_bar() as bar:
            bar.begin(dataset, len(pairs))

            async def work() -> tuple[dict[tuple[str, str], evaluation.Errors], str | None]:
                async with AsyncClient(url, model=model) as client:
                    network = (await client.model()).network
                    return await evaluation.evaluate(pairs, client, jobs, bar.advance), network

            sequences, network = asyncio.run(work())
        rows = {}
        for title, total in evaluation.totals(sequences).items():
            rows[title, ""] = total
            if each:
                rows |= {key: errors for key, errors in sequences.items() if key[0] == title}
    records = [_record(*name, errors, network) for name, errors in rows.items()]
    if format == "json":
        print(json.dumps(records, indent=1))
    elif format == "csv":
        writer = csv.DictWriter(sys.stdout, records[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(records)
    else:
        _print_table(records, network)
    _check(rows)


def _record(title: str, sequence: str, errors: "Errors", network: str | None) -> dict[str, Any]:
    """Return all measures by name: pixels, and shares from 0 to 1."""
    from flownet2.evaluate import PAPER_FIGURES, motions  # noqa: PLC0415

    paper = PAPER_FIGURES.get((title, network), (None, None)) if not sequence else (None, None)
    return {
        "set": title,
        "sequence": sequence,
        "pairs": errors.pairs,
        "pixels": errors.counts.get("all", 0),
        "missing": errors.share_missing,
        "epe": errors.mean(),
        "fl_all": errors.fl_all,
        "beyond_1px": errors.share_beyond(1),
        "beyond_3px": errors.share_beyond(3),
        **{
            f"epe_{name}": errors.mean(name)
            for name in (*motions(), "visible", "occluded", "inside", "outside")
        },
        "paper_epe": paper[0],
        "paper_fl_all": paper[1],
    }


# Columns of the table: title, key of the record, and whether it is a share.
_COLUMNS = (
    ("EPE", "epe", False),
    ("Fl-all", "fl_all", True),
    (">1 px", "beyond_1px", True),
    ("0-10", "epe_0-10", False),
    ("10-40", "epe_10-40", False),
    ("40+", "epe_40+", False),
    ("occluded", "epe_occluded", False),
    ("missing", "missing", True),
    ("paper EPE", "paper_epe", False),
    ("paper Fl-all", "paper_fl_all", True),
)


def _print_table(records: list[dict[str, Any]], network: str | None) -> None:
    """Print the errors as a table, with the paper's figures of that network beside them if any."""
    from flownet2.evaluate import PAPER  # noqa: PLC0415

    paper = any(record["paper_epe"] is not None for record in records)
    columns = [
        column
        for column in _COLUMNS
        if (paper or not column[1].startswith("paper"))
        and (column[1] != "missing" or any(record["missing"] for record in records))
    ]

    def cell(value: float | None, share: bool) -> str:
        return "" if value is None else f"{100 * value:.2f} %" if share else f"{value:.2f}"

    print_table(
        ["", "pairs", *(title for title, _, _ in columns)],
        [
            [
                record["sequence"] or record["set"],
                str(record["pairs"]),
                *(cell(record[key], share) for _, key, share in columns),
            ]
            for record in records
        ],
    )
    if paper:
        print(f"Paper: {network} in {PAPER}.")


def _check(rows: "dict[tuple[str, str], Errors]") -> None:
    """End with status 1 if a set has no ground truth, or pixels without a prediction."""
    for (title, _), errors in rows.items():
        if not errors.counts.get("all"):
            fail(f"{title}: there is no pixel with known ground truth")
        if errors.missing:
            fail(
                f"{title}: {errors.share_missing:.2%} of the pixels have no prediction: they count "
                "as wrong, and as zero motion in EPE"
            )

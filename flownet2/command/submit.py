"""`flownet2 submit`."""

import asyncio
from pathlib import Path
from typing import Annotated, Literal

import typer

from flownet2 import service
from flownet2.client import AsyncClient
from flownet2.command.options import ModelName, Server
from flownet2.command.terminal import console, fail, progress_bar, say

PATIENCE_SECONDS = 300.0
"""How long requests are retried while servers are unavailable."""


def submit(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="The dataset, with its test split, as unpacked.")
    ],
    dataset: Annotated[Literal["kitti", "sintel", "spring"], typer.Option(help="The benchmark.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="ZIP", help="The archive to write.")
    ],
    jobs: Annotated[int, typer.Option(min=1, help="Number of concurrent requests.")] = 8,
    server: Server = None,
    model: ModelName = None,
) -> None:
    """Compute the flow of a benchmark's test split and pack it for upload.

    Started again after an interruption, it computes what is missing. The archive is checked:
    number of files, sizes, finite values.

    Example: flownet2 submit --dataset kitti data_scene_flow/ -o submission.zip
    """
    from flownet2 import submit as submissions  # noqa: PLC0415

    submission, pairs = submissions.find_pairs(dataset, folder)
    if len(pairs) != submission.pairs:
        console.print(
            f"flownet2: the test split of {submission.title} has {submission.pairs} pairs, and "
            f"{folder} has {len(pairs)}: the benchmark will refuse the archive",
            markup=False,
        )
    with service.server(server, say) as url, progress_bar() as bar:
        bar.begin(dataset, len(pairs))

        async def work() -> None:
            patience = PATIENCE_SECONDS
            async with AsyncClient(
                url, model=model, timeout=2 * patience, patience=patience
            ) as client:
                await submissions.compute(pairs, output, client, jobs, bar.advance, bar.warn)

        try:
            asyncio.run(work())
        except KeyboardInterrupt:
            fail("stopped: the same command resumes", 130)
    print(f"{output}: {len(pairs)} flows of {submission.title}, checked")

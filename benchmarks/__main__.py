"""`make bench`: the benchmarks that need no GPU, as Markdown on standard output.

They take less than ten minutes on two cores. `python -m benchmarks --write` also writes them to
benchmarks/RESULTS.md, and draws error against time in benchmarks/error_time.png.
"""

import argparse
import datetime
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from benchmarks import accuracy, command, engines, web
from benchmarks.perf_analyzer import CONCURRENCIES, ROUNDS, PerfAnalyzer, Unavailable
from benchmarks.report import bypass_proxies, machine
from export.repository import HALF_MODEL
from export.shipped import write_shipped
from flownet2.contract import MODEL_NAME
from launch import triton, wheel
from launch.errors import LaunchError

RESULTS = Path(__file__).parent / "RESULTS.md"
PLOT = Path(__file__).parent / "error_time.png"
WEB_SECONDS = 5.0


def main() -> int:
    """Run the benchmarks; return 1 if the servers cannot be started."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--write", action="store_true", help="write RESULTS.md and the plot")
    options = parser.parse_args()
    bypass_proxies()
    parts = []
    try:
        for part in sections(PLOT if options.write else None):
            print(part, flush=True)
            parts.append(part)
    except LaunchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if options.write:
        RESULTS.write_text("\n".join(parts), encoding="utf-8")
    return 0


def sections(plot: Path | None) -> Iterator[str]:
    """Yield each part of the report when it is measured.

    Args:
        plot: PNG file for the plot of error against time.
    """
    yield f"# Benchmarks\n\n{datetime.date.today()}, {machine()}.\n"
    yield f"## The largest network\n\n{engines.compare_random('FlowNet2', rounds=5)}"
    yield f"## The shipped network\n\n{engines.compare_shipped(rounds=15)}"
    with tempfile.TemporaryDirectory() as folder:
        network = write_shipped(Path(folder))
        half = Path(folder) / MODEL_NAME / "1" / HALF_MODEL
        with wheel.serve(Path(folder)) as server:
            address = server.address
            errors = accuracy.precision(address, network, half)
            yield f"## Accuracy of the shipped {network}\n\n{errors}"
            results = accuracy.beside_opencv(address, network)
            if plot:
                accuracy.draw(results, plot)
            yield f"## Comparison with OpenCV\n\n{accuracy.results_table(results)}"
            yield f"## Triton under load, {network}, 512x512\n\n{perf_analyzer_table(address)}"
            yield f"## The command, {network}, 512x512\n\n{command.throughput(address)}"
    yield f"## The web layer alone, with a model that takes no time\n\n{web.compare(WEB_SECONDS)}"


def perf_analyzer_table(address: triton.Address) -> str:
    """Return perf_analyzer's table, or the reason if it cannot run."""
    try:
        return PerfAnalyzer().measure(address, CONCURRENCIES, ROUNDS)
    except Unavailable as error:
        return f"Not measured: {error}.\n"


if __name__ == "__main__":
    sys.exit(main())

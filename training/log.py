"""Log of a training run: CSV files, the curve as a picture, and a progress bar."""

from __future__ import annotations

import csv
import sys
from pathlib import Path
from typing import Any


def append_row(path: Path, row: dict[str, Any]) -> None:
    """Append a row to a CSV file; the keys of the first row are its header."""
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(row))
        if new:
            writer.writeheader()
        writer.writerow(row)


def print_progress(progress: float, elapsed: float, step: int, state: str) -> None:
    """Print a progress bar with the time left; on a terminal it replaces the previous bar."""
    left = max(0.0, elapsed / progress - elapsed)
    done = int(30 * min(1.0, progress))
    print(
        f"[{'#' * done}{'.' * (30 - done)}] step {step} {state}  "
        f"{int(left // 60)}:{int(left % 60):02} left",
        end="\r" if sys.stdout.isatty() else "\n",
        flush=True,
    )


def plot(folder: Path) -> None:
    """Draw training and validation error over time as `curve.png`, if matplotlib is installed."""
    try:
        from matplotlib.figure import Figure  # noqa: PLC0415 - the only use, and optional
    except ImportError:
        return
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name in ("log.csv", "validation.csv"):
        if not (folder / name).exists():
            continue
        with (folder / name).open(newline="") as file:
            rows = [row for row in csv.DictReader(file) if row.get("stage") != "matching"]
        curves = {"epe": "training crops"} if name == "log.csv" else {}
        curves |= {key: f"validation, {key}" for key in rows[0] if name != "log.csv"}
        minutes = [float(row["seconds"]) / 60 for row in rows]
        for key, label in curves.items():
            if key not in ("step", "seconds"):
                (line,) = axes.plot(minutes, [float(row[key]) for row in rows], label=label)
                if key == "epe":
                    line.set_color("0.8")
    # Logarithmic: errors of long motions are a hundred times those of short ones.
    axes.set(xlabel="minutes", ylabel="end-point error, pixels", yscale="log")
    figure.legend(loc="outside right upper", fontsize="small")
    axes.grid(alpha=0.3, which="both")
    figure.savefig(folder / "curve.png", dpi=110)

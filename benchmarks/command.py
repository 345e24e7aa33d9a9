"""`flownet2 run` on videos: its speed beside perf_analyzer's, and its memory by a video's length.

`python -m benchmarks.command` measures both at a Triton of its own with the shipped weights, in
some ten minutes; `make bench` the first.
"""

import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image

from benchmarks.perf_analyzer import SIZE, PerfAnalyzer, Unavailable
from benchmarks.report import bypass_proxies, table
from benchmarks.samples import sample_folders
from export.shipped import write_shipped
from launch import triton, wheel

JOBS = 4
FRAMES = 97
ROUNDS = 8
LENGTHS = (200, 20_000)
TINY = 32


@dataclass(frozen=True)
class Run:
    """A run of the command: seconds from its start to its end and from its first file to its last,
    and the most memory that it had."""

    seconds: float
    writing_seconds: float
    peak_mib: float


def throughput(address: triton.Address) -> str:
    """Pairs a second of perf_analyzer and of the command, before and after; a Markdown table."""
    try:
        program = PerfAnalyzer()
    except Unavailable as error:
        return f"Not measured: {error}.\n"
    analyzer, whole, steady = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        video = Path(folder) / "film.mp4"
        write_video(video, FRAMES, SIZE)
        for turn in range(2):
            analyzer.append(program.load(address, JOBS, ROUNDS)["Inferences/Second"])
            one = run(video, Path(folder) / f"flow{turn}", address)
            whole.append((FRAMES - 1) / one.seconds)
            steady.append((FRAMES - 2) / one.writing_seconds)
    ways = {
        "perf_analyzer, in its windows": analyzer,
        f"`flownet2 run`, {FRAMES - 1} pairs of a video, from the first to the last": steady,
        "the same with its start and end": whole,
    }
    return table(
        (f"{JOBS} requests under way", "pairs/s", "of perf_analyzer"),
        [
            (name, f"{sum(rates) / 2:.2f}", f"{sum(rates) / sum(analyzer):.2f}")
            for name, rates in ways.items()
        ],
    )


def memory(address: triton.Address) -> str:
    """The command's largest memory, by the length of the video; a Markdown table."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for length in LENGTHS:
            video = Path(folder) / f"film{length}.mp4"
            write_video(video, length, TINY)
            one = run(video, Path(folder) / "flow", address)
            rows.append((f"{length:,}", f"{one.peak_mib:.0f}", f"{length / one.seconds:.0f}"))
    return table((f"frames, {TINY}x{TINY}", "peak MiB", "frames/s"), rows)


def write_video(path: Path, frames: int, side: int) -> None:
    """A video in which a sample's frame drifts."""
    with Image.open(sample_folders()[0] / "frame0.png") as image:
        pixels = np.asarray(image.convert("RGB").resize((side, side)))
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(25))
        stream.width = stream.height = side
        for number in range(frames):
            moved = np.roll(pixels, number, axis=1)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(moved, format="rgb24")))
        container.mux(stream.encode(None))


def run(video: Path, output: Path, address: triton.Address) -> Run:
    """Run the command as a process."""
    command = [sys.executable, "-m", "flownet2", "run", str(video), "-o", str(output)]
    command += ["--server", f"grpc://{address.grpc}", "--jobs", str(JOBS)]
    began = time.perf_counter()
    process = subprocess.Popen(command)  # noqa: S603
    peak = 0
    status = Path(f"/proc/{process.pid}/status")
    # Not from wait4, whose figure counts this process too, from before the other began.
    while process.poll() is None:
        found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text(encoding="utf-8"))
        peak = int(found[1]) if found else peak
        time.sleep(0.02)
    seconds = time.perf_counter() - began
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    written = [path.stat().st_mtime for path in output.rglob("*.flo")]
    return Run(seconds, max(written) - min(written), peak / 1024)


def main() -> None:
    """Measure a Triton with the shipped weights."""
    bypass_proxies()
    with tempfile.TemporaryDirectory() as folder:
        write_shipped(Path(folder))
        with wheel.serve(Path(folder)) as server:
            print(throughput(server.address), flush=True)
            print(memory(server.address))


if __name__ == "__main__":
    main()

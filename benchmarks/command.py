"""Throughput of `flownet2 run` beside perf_analyzer's, and its memory by the length of a video.

`python -m benchmarks.command` measures both with the shipped weights, in some ten minutes;
`make bench` measures the throughput.
"""

import re
import statistics
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
from benchmarks.web import gateway_of
from export.shipped import write_shipped
from launch import triton, wheel

JOBS = 4
FRAMES = 257
ROUNDS = 8
REPEATS = 3
LENGTHS = (200, 20_000)
TINY = 32


@dataclass(frozen=True)
class Run:
    """A run of the command.

    Attributes:
        seconds: from its start to its end.
        writing_seconds: from its first file to its last.
        peak_mib: most memory that it used.
    """

    seconds: float
    writing_seconds: float
    peak_mib: float


def throughput(address: triton.Address) -> str:
    """Measure pairs per second of perf_analyzer and of the command; return a Markdown table."""
    try:
        program = PerfAnalyzer()
    except Unavailable as error:
        return f"Not measured: {error}.\n"
    rates: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder, gateway_of(address, 1) as gateway:
        video = Path(folder) / "film.mp4"
        write_video(video, FRAMES, SIZE)
        servers = {
            "grpc://": f"grpc://{address.grpc}",
            "http://": f"http://127.0.0.1:{gateway.port}",
        }
        for turn in range(REPEATS):
            measured = program.load(address, JOBS, ROUNDS)["Inferences/Second"]
            rates.setdefault("perf_analyzer, gRPC", []).append(measured)
            for scheme, server in servers.items():
                measured_run = run(video, Path(folder) / f"{turn}-{scheme[:4]}", server)
                name = f"`flownet2 run`, {scheme}"
                rates.setdefault(name, []).append((FRAMES - 2) / measured_run.writing_seconds)
                whole = f"{name}, with start and end of the process"
                rates.setdefault(whole, []).append((FRAMES - 1) / measured_run.seconds)
    reference = statistics.median(rates["perf_analyzer, gRPC"])
    return table(
        (f"{FRAMES - 1} pairs of a video, {JOBS} requests at a time", "pairs/s", "relative"),
        [
            (name, f"{statistics.median(found):.2f}", f"{statistics.median(found) / reference:.2f}")
            for name, found in rates.items()
        ],
    )


def memory(address: triton.Address) -> str:
    """Measure the peak memory of the command by the length of the video; a Markdown table."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for length in LENGTHS:
            video = Path(folder) / f"film{length}.mp4"
            write_video(video, length, TINY)
            measured_run = run(video, Path(folder) / "flow", f"grpc://{address.grpc}")
            rows.append(
                (
                    f"{length:,}",
                    f"{measured_run.peak_mib:.0f}",
                    f"{length / measured_run.seconds:.0f}",
                )
            )
    return table((f"frames, {TINY}x{TINY}", "peak MiB", "frames/s"), rows)


def write_video(path: Path, frames: int, side: int) -> None:
    """Write a video of a sample image that shifts to the right by one pixel per frame."""
    with Image.open(sample_folders()[0] / "frame0.png") as image:
        pixels = np.asarray(image.convert("RGB").resize((side, side)))
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(25))
        stream.width = stream.height = side
        for number in range(frames):
            moved = np.roll(pixels, number, axis=1)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(moved, format="rgb24")))
        container.mux(stream.encode(None))


def run(video: Path, output: Path, server: str) -> Run:
    """Run the command as a process of its own."""
    command = [sys.executable, "-m", "flownet2", "run", str(video), "-o", str(output)]
    command += ["--server", server, "--jobs", str(JOBS)]
    began = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)  # noqa: S603
    peak = 0
    status = Path(f"/proc/{process.pid}/status")
    # wait4 would count this process, too: the command starts as a copy of it.
    while process.poll() is None:
        found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text(encoding="utf-8"))
        peak = int(found[1]) if found else peak
        time.sleep(0.05)
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

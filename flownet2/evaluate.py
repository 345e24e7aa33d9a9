"""Errors of a flow against the truth, on the benchmarks' own folders.

Sintel, KITTI 2012 and 2015, Middlebury, FlyingChairs and FlyingThings3D, as they are unpacked.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from flownet2.client import AsyncClient
from flownet2.formats import Flow, FormatError, Mask, known, read_flow
from flownet2.measures import end_point_error, fl

SPEEDS = {"0-10": (0, 10), "10-40": (10, 40), "40+": (40, np.inf)}
"""Lengths of true motion, in pixels, of which errors are reported apart, as Sintel does."""

PAPER = "Ilg et al., FlowNet 2.0, CVPR 2017, table 4"
# Training sets, by network: end-point error, and share of wrong pixels (Fl-all) where it is there.
# Without Sintel's final pass, whose frames there lacked some effects, as the authors found later
# (lmb-freiburg/flownet2, issue 13).
PAPER_FIGURES: dict[tuple[str, str | None], tuple[float, float | None]] = {
    ("sintel clean", "FlowNet2"): (2.02, None),
    ("kitti 2012", "FlowNet2"): (4.09, None),
    ("kitti 2015", "FlowNet2"): (10.06, 0.3037),
    ("middlebury", "FlowNet2"): (0.35, None),
}


@dataclass(frozen=True)
class Sample:
    """Two frames, the file of their flow, and files of what counts and what is occluded."""

    first: Path
    second: Path
    truth: Path
    unoccluded: Path | None = None
    occlusions: Path | None = None
    invalid: Path | None = None

    def read(self) -> tuple[Flow, Mask | None]:
        """The true flow, NaN where it does not count, and what is occluded where that is known."""
        flow = read_flow(self.truth)
        if self.invalid is not None and self.invalid.exists():
            flow[_mask(self.invalid)] = np.nan
        if self.unoccluded is not None:
            return flow, known(flow) & ~known(read_flow(self.unoccluded))
        if self.occlusions is not None and self.occlusions.exists():
            return flow, _mask(self.occlusions)
        return flow, None


def _mask(path: Path) -> Mask:
    with Image.open(path) as image:
        mask: Mask = np.asarray(image.convert("L")) > 0
    return mask


def sintel(folder: Path) -> Iterator[tuple[str, Sample]]:
    """MPI-Sintel: both passes of training/."""
    training = folder / "training" if (folder / "training").is_dir() else folder
    for kind in ("clean", "final"):
        for truth in sorted(training.glob("flow/*/frame_*.flo")):
            scene, number = truth.parent.name, int(truth.stem[-4:])
            mask = Path(scene) / f"{truth.stem}.png"
            yield (
                f"sintel {kind}",
                Sample(
                    training / kind / scene / f"frame_{number:04}.png",
                    training / kind / scene / f"frame_{number + 1:04}.png",
                    truth,
                    occlusions=training / "occlusions" / mask,
                    invalid=training / "invalid" / mask,
                ),
            )


def kitti(folder: Path) -> Iterator[tuple[str, Sample]]:
    """KITTI 2012 or 2015: training/."""
    training = folder / "training" if (folder / "training").is_dir() else folder
    images = {"image_2": "kitti 2015", "colored_0": "kitti 2012", "image_0": "kitti 2012"}
    for name, title in images.items():
        if (training / name).is_dir():
            for truth in sorted((training / "flow_occ").glob("*_10.png")):
                first = training / name / truth.name
                second = training / name / truth.name.replace("_10", "_11")
                yield title, Sample(first, second, truth, training / "flow_noc" / truth.name)
            return


def middlebury(folder: Path) -> Iterator[tuple[str, Sample]]:
    """Middlebury: other-data/ and other-gt-flow/."""
    for truth in sorted(folder.glob("other-gt-flow/*/flow10.flo")):
        frames = folder / "other-data" / truth.parent.name
        yield "middlebury", Sample(frames / "frame10.png", frames / "frame11.png", truth)


def chairs(folder: Path) -> Iterator[tuple[str, Sample]]:
    """FlyingChairs: those of data/ that its list, if it is there, keeps for validation."""
    truths = sorted(folder.glob("data/*_flow.flo"))
    split = folder / "FlyingChairs_train_val.txt"
    parts = split.read_text().split() if split.exists() else ["2"] * len(truths)
    for truth, part in zip(truths, parts, strict=True):
        if part == "2":
            stem = str(truth).removesuffix("_flow.flo")
            yield "chairs", Sample(Path(f"{stem}_img1.ppm"), Path(f"{stem}_img2.ppm"), truth)


def things(folder: Path) -> Iterator[tuple[str, Sample]]:
    """FlyingThings3D: the left camera's test set, forwards in time, in both passes."""
    for kind in ("cleanpass", "finalpass"):
        if not (folder / f"frames_{kind}").is_dir():
            continue
        for truth in sorted(folder.glob("optical_flow/TEST/*/*/into_future/left/*.pfm")):
            scene = folder / f"frames_{kind}" / "TEST" / truth.parts[-5] / truth.parts[-4] / "left"
            number = int(truth.stem.split("_")[1])
            frames = [file for n in (number, number + 1) for file in scene.glob(f"{n:04}.*")]
            if len(frames) == 2:  # the last flow of a scene leads out of it
                yield f"things {kind}", Sample(frames[0], frames[1], truth)


DATASETS: dict[str, Callable[[Path], Iterator[tuple[str, Sample]]]] = {
    "sintel": sintel,
    "kitti": kitti,
    "middlebury": middlebury,
    "chairs": chairs,
    "things": things,
}


@dataclass
class Errors:
    """Errors over many pixels: sums and counts, by what the pixels have in common.

    As the benchmarks do: of all known pixels of a set, whichever pair they are of.
    """

    sums: dict[str, float] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    wrong: int = 0
    pairs: int = 0

    def add(self, flow: Flow, truth: Flow, occluded: Mask | None = None) -> None:
        """Count a flow in; FormatError where its size is not that of the truth."""
        if flow.shape != truth.shape:
            raise FormatError(
                f"the flow is {flow.shape[1]}x{flow.shape[0]} and the truth "
                f"{truth.shape[1]}x{truth.shape[0]}"
            )
        error = end_point_error(flow, truth)
        valid = known(truth) & known(flow)
        speed = np.hypot(truth[..., 0], truth[..., 1])
        self._count("all", error[valid])
        for name, (low, high) in SPEEDS.items():
            self._count(name, error[valid & (speed >= low) & (speed < high)])
        if occluded is not None:
            self._count("occluded", error[valid & occluded])
        self.wrong += int((fl(flow, truth) & valid).sum())
        self.pairs += 1

    def _count(self, name: str, errors: npt.NDArray[np.float64]) -> None:
        self.sums[name] = self.sums.get(name, 0.0) + float(errors.sum())
        self.counts[name] = self.counts.get(name, 0) + errors.size

    def mean(self, name: str = "all") -> float | None:
        """Mean end-point error, in pixels, of one kind of pixel; None without any."""
        count = self.counts.get(name, 0)
        return self.sums[name] / count if count else None

    @property
    def fl_all(self) -> float | None:
        """Share of wrong pixels."""
        return self.wrong / self.counts["all"] if self.counts.get("all") else None


async def evaluate(
    samples: Iterable[tuple[str, Sample]],
    client: AsyncClient,
    jobs: int,
    advance: Callable[[], None],
) -> dict[str, Errors]:
    """Errors of a server's flow, by set.

    Args:
        samples: set and sample, as the functions of `DATASETS` give them.
        client: who is asked.
        jobs: requests under way at a time.
        advance: called for each sample that is done.

    Raises:
        FlowError, FormatError, OSError: a sample that cannot be had.
    """
    errors: dict[str, Errors] = {}
    under_way: deque[tuple[str, Sample, asyncio.Task[Flow]]] = deque()

    async def ask(sample: Sample) -> Flow:
        return (await client.flow(sample.first, sample.second)).flow

    async def finish() -> None:
        name, sample, task = under_way.popleft()
        flow = await task
        truth, occluded = await asyncio.to_thread(sample.read)
        await asyncio.to_thread(errors.setdefault(name, Errors()).add, flow, truth, occluded)
        advance()

    try:
        for name, sample in samples:
            if len(under_way) == jobs:
                await finish()
            under_way.append((name, sample, asyncio.create_task(ask(sample))))
        while under_way:
            await finish()
    finally:
        for _, _, task in under_way:
            task.cancel()
    return errors

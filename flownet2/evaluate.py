"""Errors of flow against the ground truth, of a file or of a server on a benchmark."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np

from flownet2.client import AsyncClient
from flownet2.concurrency import in_order
from flownet2.datasets import Sample
from flownet2.errors import Error
from flownet2.formats import Flow, Mask, known, read_flow
from flownet2.measures import end_point_error, fl, nearest_truth

SPEEDS = (10.0, 40.0)
"""Lengths of true motion, in pixels, between the groups that Sintel reports."""

PAPER = "Ilg et al., FlowNet 2.0, CVPR 2017, table 4"
# Training sets, by network: end-point error, and share of wrong pixels (Fl-all) if it is given.
# Sintel's final pass is left out: its frames lacked some effects, as the authors found later
# (lmb-freiburg/flownet2, issue 13).
PAPER_FIGURES: dict[tuple[str, str | None], tuple[float, float | None]] = {
    ("sintel clean", "FlowNet2"): (2.02, None),
    ("kitti 2012", "FlowNet2"): (4.09, None),
    ("kitti 2015", "FlowNet2"): (10.06, 0.3037),
    ("middlebury", "FlowNet2"): (0.35, None),
}


class EvaluationError(Error):
    """Raised for flow that cannot be compared with the ground truth."""


def motions(speeds: Sequence[float] = SPEEDS) -> dict[str, tuple[float, float]]:
    """Return the ranges of motion, in pixels, between `speeds`, by name: "0-10", "10-40", "40+"."""
    return {
        f"{low:g}+" if high == np.inf else f"{low:g}-{high:g}": (low, high)
        for low, high in pairwise([0.0, *speeds, np.inf])
    }


def groups(
    truth: Flow, occluded: Mask | None = None, speeds: Sequence[float] = SPEEDS
) -> dict[str, Mask]:
    """Group the pixels that have ground truth.

    Args:
        truth: `[H, W, 2]`, in pixels; NaN where it is unknown.
        occluded: mask of the pixels that the second frame does not show.
        speeds: lengths of motion between the groups, in pixels.

    Returns:
        Masks `[H, W]`: "all"; by length of the true motion ("0-10", …); "inside" and "outside", by
        the end point of the true motion; "visible" and "occluded" if `occluded` is given.
    """
    valid = known(truth)
    length = np.hypot(truth[..., 0], truth[..., 1])
    masks = {"all": valid}
    for name, (low, high) in motions(speeds).items():
        masks[name] = valid & (length >= low) & (length < high)
    height, width = length.shape
    x = np.arange(width) + truth[..., 0]
    y = np.arange(height)[:, None] + truth[..., 1]
    inside = (x >= -0.5) & (x <= width - 0.5) & (y >= -0.5) & (y <= height - 0.5)
    masks |= {"inside": valid & inside, "outside": valid & ~inside}
    if occluded is not None:
        masks |= {"visible": valid & ~occluded, "occluded": valid & occluded}
    return masks


@dataclass
class Errors:
    """Sums of end-point errors over any number of pairs, by the groups of `groups`.

    Pixels of all pairs count equally, as in the benchmarks. A pixel with ground truth but without
    a prediction is wrong (`fl_all`, `share_beyond`), counts as a prediction of zero motion in the
    end-point error, and is counted in `missing`.

    Attributes:
        speeds: lengths of true motion between the groups, in pixels.
    """

    speeds: Sequence[float] = SPEEDS
    sums: dict[str, float] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    beyond: dict[int, int] = field(default_factory=lambda: {1: 0, 3: 0})
    wrong: int = 0
    missing: int = 0
    pairs: int = 0

    def add(
        self,
        flow: Flow,
        truth: Flow,
        occluded: Mask | None = None,
        *,
        supersampled: bool = False,
    ) -> None:
        """Add the errors of a pair.

        Args:
            flow: the prediction `[height, width, 2]`, in pixels; NaN where there is none.
            truth: the ground truth; NaN at pixels that are not evaluated.
            occluded: mask `[height, width]` of pixels that the second frame does not show.
            supersampled: whether `truth` has four vectors for each pixel, of which the nearest to
                the prediction counts.

        Raises:
            EvaluationError: the sizes differ.
        """
        scale = 2 if supersampled else 1
        height, width, _ = flow.shape
        if truth.shape != (scale * height, scale * width, 2):
            raise EvaluationError(
                f"the flow is {width}x{height} and the ground truth "
                f"{truth.shape[1]}x{truth.shape[0]}"
            )
        predicted = known(flow)
        flow = np.where(predicted[..., None], flow, np.float32(0))
        if supersampled:
            truth = nearest_truth(flow, truth)
        error = end_point_error(flow, truth)
        masks = groups(truth, occluded, self.speeds)
        for name, mask in masks.items():
            self.sums[name] = self.sums.get(name, 0.0) + float(error[mask].sum())
            self.counts[name] = self.counts.get(name, 0) + int(mask.sum())
        valid = masks["all"]
        missing = valid & ~predicted
        for pixels in self.beyond:
            self.beyond[pixels] += int((valid & (error > pixels) | missing).sum())
        self.wrong += int((valid & fl(flow, truth) | missing).sum())
        self.missing += int(missing.sum())
        self.pairs += 1

    def merge(self, other: "Errors") -> None:
        """Add the errors of all pairs of another object."""
        for name, count in other.counts.items():
            self.counts[name] = self.counts.get(name, 0) + count
            self.sums[name] = self.sums.get(name, 0.0) + other.sums[name]
        for pixels, count in other.beyond.items():
            self.beyond[pixels] += count
        self.wrong += other.wrong
        self.missing += other.missing
        self.pairs += other.pairs

    def mean(self, group: str = "all") -> float | None:
        """Return the mean end-point error of a group, in pixels; None without pixels."""
        count = self.counts.get(group, 0)
        return self.sums[group] / count if count else None

    @property
    def fl_all(self) -> float | None:
        """Share of wrong pixels by KITTI's rule, 0 to 1; None without pixels."""
        return self._share(self.wrong)

    @property
    def share_missing(self) -> float | None:
        """Share of pixels without a prediction, 0 to 1; None without pixels."""
        return self._share(self.missing)

    def share_beyond(self, pixels: int) -> float | None:
        """Return the share of pixels off by more than 1 or 3 pixels; None without pixels."""
        return self._share(self.beyond[pixels])

    def _share(self, count: int) -> float | None:
        return count / self.counts["all"] if self.counts.get("all") else None


def compare_files(prediction: Path, truth: Path) -> Errors:
    """Compute the errors of a flow file against a file of ground truth.

    Ground truth in a .flo5 file of twice the height and width is Spring's, see `nearest_truth`.

    Raises:
        Error: a file is damaged, or the sizes differ.
        OSError: a file cannot be read.
    """
    flow, true_flow = read_flow(prediction), read_flow(truth)
    double = true_flow.shape[:2] == (2 * flow.shape[0], 2 * flow.shape[1])
    errors = Errors()
    errors.add(flow, true_flow, supersampled=double and truth.suffix.lower() == ".flo5")
    return errors


async def evaluate(
    samples: Iterable[Sample],
    client: AsyncClient,
    jobs: int,
    advance: Callable[[], None],
) -> dict[tuple[str, str], Errors]:
    """Compute the errors of a server's flow, by set and sequence.

    Args:
        samples: the pairs.
        client: the client of the server.
        jobs: number of concurrent requests.
        advance: called after each pair.

    Raises:
        Error: a pair cannot be read, or the server returns no flow for it.
        OSError: a file cannot be read.
    """
    errors: dict[tuple[str, str], Errors] = {}

    async def request(sample: Sample) -> Flow:
        return (await client.flow(sample.first, sample.second)).flow

    def add(sample: Sample, flow: Flow) -> None:
        truth, occluded = sample.read()
        of_sequence = errors.setdefault((sample.title, sample.sequence), Errors())
        try:
            of_sequence.add(flow, truth, occluded, supersampled=sample.supersampled)
        except EvaluationError as error:
            raise EvaluationError(f"{sample.truth}: {error}") from error

    await in_order(samples, request, add, jobs, advance)
    return errors


def totals(errors: dict[tuple[str, str], Errors]) -> dict[str, Errors]:
    """Sum up the errors of the sequences of each set."""
    sums: dict[str, Errors] = {}
    for (title, _), of_sequence in errors.items():
        sums.setdefault(title, Errors()).merge(of_sequence)
    return sums

"""Image pairs with ground truth in memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from flownet2.datasets import DatasetError, Sample, samples
from flownet2.formats import Flow, Mask, known
from flownet2.images import Pixels


@dataclass(frozen=True)
class Pair:
    """A pair with its ground truth.

    `frames` uint8 RGB [H, W, 3]; `flow` float32 [H, W, 2] in pixels, zero where it is not `valid`;
    `valid` bool [H, W]; `occluded` bool [H, W] if it is known.
    """

    name: str
    frames: tuple[Pixels, Pixels]
    flow: Flow
    valid: Mask
    occluded: Mask | None = None

    @property
    def family(self) -> str:
        """Return the name up to the first underscore: `sintel` of `sintel_clean_alley_1_0001`."""
        return self.name.split("_")[0]


def read_sample(sample: Sample) -> Pair:
    """Read a pair of a dataset.

    Raises:
        FormatError, DatasetError, OSError: a file is missing or damaged, or sizes differ.
    """
    frames = []
    for path in (sample.first, sample.second):
        with Image.open(path) as image:
            frames.append(np.asarray(image.convert("RGB")))
    flow, occluded = sample.read()
    if sample.supersampled:
        flow, occluded = flow[::2, ::2], None if occluded is None else occluded[::2, ::2]
    if not frames[0].shape[:2] == frames[1].shape[:2] == flow.shape[:2]:
        raise DatasetError(f"{sample.truth}: the flow and its frames differ in size")
    valid = known(flow)
    flow = np.where(valid[..., None], flow, np.float32(0))
    return Pair(sample.sequence, (frames[0], frames[1]), flow, valid, occluded)


def read_pairs(folder: Path) -> Iterator[Pair]:
    """Return the pairs below a folder by name.

    A pair is a folder with `frame0.*`, `frame1.*` and `gt.flo` or `gt.png`.

    Raises:
        FormatError, DatasetError, OSError: there is no pair, or as `read_sample`.
    """
    for sample in sorted(samples("pairs", folder), key=lambda pair: pair.sequence):
        yield read_sample(sample)

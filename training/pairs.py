"""Image pairs with true flow on disk: one folder each, as benchmarks publish them.

A folder holds `frame0.*` and `frame1.*` (any format that Pillow opens) and the flow between them,
`gt.flo` (Middlebury) or `gt.png` (KITTI). `invalid.png`, if present, marks by values above zero
what is left out (MPI-Sintel), `occlusions.png` what the second frame does not show.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from flownet2.formats import Flow, known, read_flow


@dataclass(frozen=True)
class Pair:
    """`frames` uint8 RGB [H, W, 3]; `flow` float32 [H, W, 2] in pixels; `valid` bool [H, W];
    `occluded` bool [H, W] where it is known."""

    name: str
    frames: tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]
    flow: Flow
    valid: npt.NDArray[np.bool_]
    occluded: npt.NDArray[np.bool_] | None = None

    @property
    def family(self) -> str:
        """The name up to the first underscore: `sintel` of `sintel_clean_alley_1_0001`."""
        return self.name.split("_")[0]


def read_pair(folder: Path) -> Pair:
    """Read one folder; ValueError where a file is missing or cannot be read, or sizes differ."""
    frames = []
    for stem in ("frame0", "frame1"):
        found = sorted(folder.glob(f"{stem}.*"))
        if not found:
            raise ValueError(f"{folder} has no {stem}.* image")
        with Image.open(found[0]) as opened:
            frames.append(np.asarray(opened.convert("RGB")))
    truth = next((folder / name for name in ("gt.flo", "gt.png") if (folder / name).exists()), None)
    if truth is None:
        raise ValueError(f"{folder} has neither gt.flo nor gt.png")
    flow = read_flow(truth)
    if not frames[0].shape[:2] == frames[1].shape[:2] == flow.shape[:2]:
        raise ValueError(f"{folder}: the frames and the flow differ in size")
    valid = known(flow)
    invalid, occluded = (_mask(folder / name) for name in ("invalid.png", "occlusions.png"))
    if invalid is not None:
        valid &= ~invalid
    flow = np.where(valid[..., None], flow, np.float32(0))
    return Pair(folder.name, (frames[0], frames[1]), flow, valid, occluded)


def _mask(path: Path) -> npt.NDArray[np.bool_] | None:
    """Where a picture is above zero; None where there is no such file."""
    if not path.exists():
        return None
    with Image.open(path) as opened:
        mask: npt.NDArray[np.bool_] = np.asarray(opened.convert("L")) > 0
    return mask


def read_pairs(folder: Path) -> Iterator[Pair]:
    """Every pair below `folder`, by name; ValueError where there is none."""
    folders = sorted(path for path in folder.iterdir() if path.is_dir())
    if not folders:
        raise ValueError(f"{folder} holds no folders of image pairs")
    for path in folders:
        yield read_pair(path)

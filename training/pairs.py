"""Image pairs with true flow on disk: one folder each, as benchmarks publish them.

A folder holds `frame0.*` and `frame1.*` (any format that Pillow opens) and the flow between them,
`gt.flo` (Middlebury) or `gt.png` (KITTI). `invalid.png`, if present, marks by values above zero
what is left out (MPI-Sintel).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image

from gateway.encoding import FLO_TAG, KITTI_SCALE, KITTI_ZERO, Flow

UNKNOWN_FLOW = 1e9  # Middlebury: larger values mean unknown


class PairError(ValueError):
    """A folder of image pairs that cannot be read as one; the message says what is missing."""


@dataclass(frozen=True)
class Pair:
    """`frames` uint8 RGB [H, W, 3]; `flow` float32 [H, W, 2] in pixels; `valid` bool [H, W]."""

    name: str
    frames: tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]
    flow: Flow
    valid: npt.NDArray[np.bool_]

    @property
    def family(self) -> str:
        """The name up to the first underscore: `sintel` of `sintel_clean_alley_1_0001`."""
        return self.name.split("_")[0]


def read_flo(path: Path) -> tuple[Flow, npt.NDArray[np.bool_]]:
    """Flow and what of it is known, from a Middlebury .flo file."""
    content = path.read_bytes()
    if len(content) < 12 or struct.unpack("<f", content[:4])[0] != FLO_TAG:
        raise PairError(f"{path} is not a Middlebury .flo file")
    width, height = struct.unpack("<ii", content[4:12])
    if len(content) != 12 + 8 * width * height:
        raise PairError(f"{path} is cut short: {width}x{height} flows do not fill it")
    flow = np.frombuffer(content, "<f4", offset=12).reshape(height, width, 2).astype(np.float32)
    valid = (np.abs(flow) < UNKNOWN_FLOW).all(axis=2)
    return np.where(valid[..., None], flow, np.float32(0)), valid


def read_kitti(path: Path) -> tuple[Flow, npt.NDArray[np.bool_]]:
    """Flow and what of it is known, from a KITTI flow PNG (16-bit RGB)."""
    picture = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    if picture is None or picture.dtype != np.uint16 or picture.ndim != 3:
        raise PairError(f"{path} is not a KITTI flow PNG with three 16-bit channels")
    coded = picture[..., ::-1].astype(np.float32)  # OpenCV reads BGR
    valid = coded[..., 2] > 0
    flow = (coded[..., :2] - np.float32(KITTI_ZERO)) / np.float32(KITTI_SCALE)
    return np.where(valid[..., None], flow, np.float32(0)), valid


def read_pair(folder: Path) -> Pair:
    """Read one folder; :class:`PairError` where a file is missing or sizes differ."""
    frames = []
    for stem in ("frame0", "frame1"):
        found = sorted(folder.glob(f"{stem}.*"))
        if not found:
            raise PairError(f"{folder} has no {stem}.* image")
        with Image.open(found[0]) as opened:
            frames.append(np.asarray(opened.convert("RGB")))
    if (folder / "gt.flo").exists():
        flow, valid = read_flo(folder / "gt.flo")
    elif (folder / "gt.png").exists():
        flow, valid = read_kitti(folder / "gt.png")
    else:
        raise PairError(f"{folder} has neither gt.flo nor gt.png")
    if not frames[0].shape[:2] == frames[1].shape[:2] == flow.shape[:2]:
        raise PairError(f"{folder}: the frames and the flow differ in size")
    if (folder / "invalid.png").exists():
        with Image.open(folder / "invalid.png") as opened:
            valid = valid & (np.asarray(opened.convert("L")) == 0)
    return Pair(folder.name, (frames[0], frames[1]), flow, valid)


def read_pairs(folder: Path) -> Iterator[Pair]:
    """Every pair below `folder`, by name; :class:`PairError` where there is none."""
    folders = sorted(path for path in folder.iterdir() if path.is_dir())
    if not folders:
        raise PairError(f"{folder} holds no folders of image pairs")
    for path in folders:
        yield read_pair(path)

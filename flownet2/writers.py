"""What is written of a pair's flow, and of a source's: files by name, and their content."""

import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from flownet2 import video
from flownet2.backends import Result
from flownet2.client import Direction
from flownet2.colours import colours
from flownet2.formats import FORMATS, Flow, Mask, known, to_picture
from flownet2.images import Frame, Pixels

VIDEO = "flow.mp4"
PICTURES = ".mp4"
FRAMES_PER_SECOND = 25
"""Of videos of frames without times."""
STRETCH = 8
"""Pairs whose motion sets a video's scale."""

# Ends of the names of a pair's files, by format; a video is of all pairs.
_ENDS: dict[str, tuple[str, ...]] = {name: (format.suffix,) for name, format in FORMATS.items()}
_ENDS |= {"jpg": ("_x.jpg", "_y.jpg"), "mp4": ()}
_SIDES = {"forward": ("",), "backward": ("_backward",), "both": ("", "_backward")}
NAMES = tuple(_ENDS)


@dataclass(frozen=True)
class Options:
    """What to write.

    Attributes:
        formats: some of `NAMES`.
        direction: "forward", "backward" or "both".
        occlusion: whether masks of what is occluded are written.
        bound: flow, in pixels, at the ends of jpg's range.
        max_flow: length, in pixels, of the strongest colours; None: of each picture, and for
            videos of their first stretch.
        side_by_side: whether videos show the first frame beside the flow.
    """

    formats: tuple[str, ...] = ("flo",)
    direction: Direction = "forward"
    occlusion: bool = False
    bound: float = 20.0
    max_flow: float | None = None
    side_by_side: bool = False

    @property
    def asked(self) -> Direction:
        """The direction to ask a server for."""
        return "both" if self.occlusion else self.direction

    def names(self, stem: str) -> list[str]:
        """The files of a pair."""
        names = [
            f"{stem}{side}{end}"
            for side in _SIDES[self.direction]
            for format in self.formats
            for end in _ENDS[format]
        ]
        return [*names, f"{stem}_occluded.png"] if self.occlusion else names

    def files(self, stem: str, result: Result) -> Iterator[tuple[str, bytes]]:
        """Names and contents of a pair's files."""
        flows = {"": result.flow, "_backward": result.flow_backward}
        if self.asked == "backward":
            flows["_backward"] = result.flow
        for side in _SIDES[self.direction]:
            flow = flows[side]
            assert flow is not None
            for format in self.formats:
                for end, content in zip(_ENDS[format], self._contents(format, flow), strict=True):
                    yield f"{stem}{side}{end}", content
        if self.occlusion and result.occluded is not None:
            yield f"{stem}_occluded.png", mask_png(result.occluded)

    def _contents(self, format: str, flow: Flow) -> list[bytes]:
        if format == "mp4":
            return []
        if format == "jpg":
            return grey_jpgs(flow, self.bound)
        if format == "png":
            return [to_picture(flow, self.max_flow)]
        return [FORMATS[format].encode(flow)]


def grey_jpgs(flow: Flow, bound: float) -> list[bytes]:
    """u and v as grey JPEGs, -bound black and +bound white, as action recognition reads them."""
    levels = np.clip(np.rint((flow + bound) * (255 / (2 * bound))), 0, 255)
    return [_jpeg(np.nan_to_num(levels[..., i], nan=128).astype(np.uint8)) for i in (0, 1)]


def mask_png(mask: Mask) -> bytes:
    """A 1-bit PNG, white where the mask is true."""
    file = io.BytesIO()
    Image.fromarray(mask).save(file, "PNG")
    return file.getvalue()


def _jpeg(pixels: npt.NDArray[np.uint8], **options: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=95, **options)
    return file.getvalue()


def motion(flow: Flow) -> float:
    """The longest vector, in pixels, but for the longest half percent; at least 1."""
    lengths = np.hypot(flow[..., 0], flow[..., 1])[known(flow)]
    return max(1.0, float(np.percentile(lengths, 99.5))) if lengths.size else 1.0


def video_picture(flow: Flow, scale: float, beside: Pixels | None) -> bytes:
    """A video's picture of one flow, to the right of the frame that it belongs to if given."""
    picture = colours(flow, scale)
    if beside is not None:
        picture = np.concatenate([beside, picture], axis=1)
    return _jpeg(picture, subsampling=0)


def write_video(path: Path, pictures: Iterable[tuple[float | None, str]]) -> None:
    """Write a video of picture files with their times, in seconds; without times 25 a second."""
    video.write(
        path,
        (
            (number / FRAMES_PER_SECOND if time is None else time, Frame(picture).pixels())
            for number, (time, picture) in enumerate(pictures)
        ),
    )

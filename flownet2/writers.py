"""Files that a run writes for each pair, and the video of a source: names and contents."""

import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from flownet2 import video
from flownet2.backends import Result
from flownet2.client import Direction
from flownet2.colours import colours
from flownet2.errors import Error
from flownet2.formats import FORMATS, Flow, Mask, known, to_picture
from flownet2.images import Frame, Pixels
from flownet2.pairs import Pair

VIDEO = "flow.mp4"
PICTURES = ".mp4"
"""Folder of a video's pictures until the video is written."""
FRAMES_PER_SECOND = 25
"""Rate of videos of frames without times."""
STRETCH = 8
"""Number of pairs whose motion determines a video's scale."""

# Endings of the names of a pair's files, by format. A video covers all pairs of a source.
_ENDS: dict[str, tuple[str, ...]] = {name: (format.suffix,) for name, format in FORMATS.items()}
_ENDS |= {"jpg": ("_x.jpg", "_y.jpg"), "mp4": ()}
_SIDES = {"forward": ("",), "backward": ("_backward",), "both": ("", "_backward")}
FORMAT_NAMES = tuple(_ENDS)

DEFAULT_NAMES = "{number:06}"
PRESETS = {
    "mmaction": ("flow_{axis}_{ordinal:05}", "jpg"),
    "tsn": ("flow_{axis}_{ordinal:05}", "jpg"),
    "raft": ("frame{ordinal:04}", "flo"),
}
"""Pattern of names and default format, by the program that reads the files."""


class PatternError(Error):
    """Raised for a pattern of names that cannot be used."""


@dataclass(frozen=True)
class Options:
    """Files to write.

    Attributes:
        formats: some of `FORMAT_NAMES`.
        direction: "forward", "backward" or "both".
        occlusion: whether to write occlusion masks.
        bound: flow in pixels at the ends of the range of jpg.
        max_flow: length of the strongest colours in pixels. None: the longest vector of each
            picture; for videos, that of the first pairs.
        side_by_side: whether to show the first frame beside the flow in videos.
        pattern: name of a pair's files without suffix; see `check_pattern`.
    """

    formats: tuple[str, ...] = ("flo",)
    direction: Direction = "forward"
    occlusion: bool = False
    bound: float = 20.0
    max_flow: float | None = None
    side_by_side: bool = False
    pattern: str = DEFAULT_NAMES

    @property
    def requested(self) -> Direction:
        """The direction to request from a server."""
        return "both" if self.occlusion else self.direction

    def names(self, pair: Pair) -> list[str]:
        """Return the names of a pair's files."""
        names = [
            name
            for side in _SIDES[self.direction]
            for format in self.formats
            for name in self._names(pair, side, format)
        ]
        return [*names, self._mask_name(pair)] if self.occlusion else names

    def files(self, pair: Pair, result: Result) -> Iterator[tuple[str, bytes]]:
        """Yield the names and contents of a pair's files."""
        flows = {"": result.flow, "_backward": result.flow_backward}
        if self.requested == "backward":
            flows["_backward"] = result.flow
        for side in _SIDES[self.direction]:
            flow = flows[side]
            assert flow is not None
            for format in self.formats:
                names = self._names(pair, side, format)
                yield from zip(names, self._contents(format, flow), strict=True)
        if self.occlusion and result.occluded is not None:
            yield self._mask_name(pair), mask_png(result.occluded)

    @property
    def numbered(self) -> bool:
        """True if the names of two pairs of a video always differ."""
        return _filled(self.pattern, number=0) != _filled(self.pattern, number=1)

    def _names(self, pair: Pair, side: str, format: str) -> list[str]:
        if format == "jpg" and "{axis" in self.pattern and not pair.output:
            return [f"{self._stem(pair, axis)}{side}.jpg" for axis in "xy"]
        return [f"{self._stem(pair)}{side}{end}" for end in _ENDS[format]]

    def _mask_name(self, pair: Pair) -> str:
        return f"{self._stem(pair)}_occluded.png"

    def _stem(self, pair: Pair, axis: str = "xy") -> str:
        return pair.output or _filled(self.pattern, pair.number, pair.stem, axis)

    def _contents(self, format: str, flow: Flow) -> list[bytes]:
        if format == "mp4":
            return []
        if format == "jpg":
            return grey_jpgs(flow, self.bound)
        if format == "png":
            return [to_picture(flow, self.max_flow)]
        return [FORMATS[format].encode(flow)]


def check_pattern(pattern: str) -> None:
    """Check a pattern of names.

    It may contain `{number}`, the number of the first frame from 0; `{ordinal}`, the same from 1;
    `{stem}`, the name of the first image or of the video without suffix; and `{axis}`, x or y in
    pairs of JPEGs, else xy. Format specifications such as `{number:05}` are allowed.

    Raises:
        PatternError: a field is unknown, or the names are not paths below a folder.
    """
    try:
        path = PurePosixPath(_filled(pattern, 0))
    except (LookupError, ValueError, AttributeError, TypeError) as error:
        raise PatternError(
            f"{pattern!r} is no pattern of names: use {{number}}, {{ordinal}}, {{stem}}, {{axis}}, "
            f"and formats such as {{number:05}} ({error})"
        ) from error
    if not path.parts or path.is_absolute() or any(part.startswith(".") for part in path.parts):
        raise PatternError(f"{pattern!r} does not give names below the folder of a source")


def _filled(pattern: str, number: int, stem: str = "stem", axis: str = "xy") -> str:
    return pattern.format(number=number, ordinal=number + 1, stem=stem, axis=axis)


def grey_jpgs(flow: Flow, bound: float) -> list[bytes]:
    """Encode u and v as grey JPEGs, -`bound` pixels as black and +`bound` as white."""
    levels = np.clip(np.rint((flow + bound) * (255 / (2 * bound))), 0, 255)
    return [_jpeg(np.nan_to_num(levels[..., i], nan=128).astype(np.uint8)) for i in (0, 1)]


def mask_png(mask: Mask) -> bytes:
    """Encode a mask as a 1-bit PNG, white where it is true."""
    file = io.BytesIO()
    Image.fromarray(mask).save(file, "PNG")
    return file.getvalue()


def _jpeg(pixels: npt.NDArray[np.uint8], **options: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=95, **options)
    return file.getvalue()


def motion(flow: Flow) -> float:
    """Return the 99.5th percentile of the lengths of the vectors in pixels, at least 1."""
    lengths = np.hypot(flow[..., 0], flow[..., 1])[known(flow)]
    return max(1.0, float(np.percentile(lengths, 99.5))) if lengths.size else 1.0


def video_picture(flow: Flow, scale: float, beside: Pixels | None) -> bytes:
    """Encode a flow in colours as a JPEG, to the right of its frame if that is given."""
    picture = colours(flow, scale)
    if beside is not None:
        picture = np.concatenate([beside, picture], axis=1)
    return _jpeg(picture, subsampling=0)


def write_video(path: Path, pictures: Iterable[tuple[float | None, str]]) -> None:
    """Write a video of picture files.

    Args:
        path: the file to write.
        pictures: presentation times in seconds, or None for 25 per second, and paths.
    """
    video.write(
        path,
        (
            (number / FRAMES_PER_SECOND if time is None else time, Frame(picture).pixels())
            for number, (time, picture) in enumerate(pictures)
        ),
    )

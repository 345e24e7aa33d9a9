"""Pairs of frames from videos, image files and lists, in order."""

import hashlib
import itertools
import re
import time
import urllib.error
import urllib.request
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import PurePath

import numpy as np
from PIL import Image

from flownet2 import lists, storage, video
from flownet2.errors import Error
from flownet2.images import Frame, Pixels

Warn = Callable[[str], None]
_LONGEST_GAP_SECONDS = 10.0
"""Resampling does not fill longer gaps between frames."""
_LONGEST_NUMBER = 9
"""Longer numbers in the names of frames are timestamps."""
_HEAD_SECONDS = 10.0
"""Timeout for the size of a file on a web server."""


class SourceError(Error):
    """Raised when a source cannot be read, or only in part; the message names it."""


@dataclass(frozen=True)
class SourceFrame:
    """A frame of a source.

    Attributes:
        number: position in the source, from 0.
        name: name of its file, or its number in the video.
        time: presentation time in seconds; None for image files.
        frame: the image.
        continuous: False if frames are missing between the previous frame and this one.
    """

    number: int
    name: str
    time: float | None
    frame: Frame
    continuous: bool = True


@dataclass(frozen=True)
class Pair:
    """Two frames.

    Attributes:
        number: number in the names of the pair's files: of the first frame, or of the line in a
            list.
        stem: name of the first image, or of the video, without its suffix.
        first: the first frame.
        second: the second frame.
        output: name of the pair's files without suffix, if a list gives one, else "".
        line: line of the list, or 0.
    """

    number: int
    stem: str
    first: SourceFrame
    second: SourceFrame
    output: str = ""
    line: int = 0


@dataclass(frozen=True)
class Position:
    """A place in a source: a frame's number, or seconds after the first frame."""

    value: float
    seconds: bool = False


@dataclass(frozen=True)
class Selection:
    """The frames of a source that make pairs.

    Attributes:
        step: distance of the two frames of a pair.
        start: the first frame.
        end: the frame to stop before; None for the end of the source.
        max_edge: longest edge in pixels, to which larger frames are reduced.
        short_edge: shorter edge in pixels, to which larger frames are reduced.
        fps: rate at which videos are resampled, in frames per second.
        deinterlace: whether videos are deinterlaced.
    """

    step: int = 1
    start: Position = Position(0)
    end: Position | None = None
    max_edge: int | None = None
    short_edge: int | None = None
    fps: float | None = None
    deinterlace: bool = False

    def frame_range(self, path: str) -> slice:
        """Return the frames as a slice; raise SourceError if the selection uses times."""
        if self.start.seconds or (self.end is not None and self.end.seconds) or self.fps:
            raise SourceError(
                f"{path} has no times: give --start and --end as numbers of frames, without --fps"
            )
        return slice(int(self.start.value), None if self.end is None else int(self.end.value))

    def frame(self, source: str | Callable[[], Pixels], name: str) -> Frame:
        """Return a frame that is reduced to the wanted size when it is read."""
        frame = Frame(source, name)
        if self.max_edge is None and self.short_edge is None:
            return frame
        return Frame(lambda: self._reduced(frame.pixels()), name)

    def _reduced(self, pixels: Pixels) -> Pixels:
        height, width, _ = pixels.shape
        scale = 1.0
        if self.max_edge:
            scale = min(scale, self.max_edge / max(height, width))
        if self.short_edge:
            scale = min(scale, self.short_edge / min(height, width))
        if scale == 1.0:
            return pixels
        size = max(1, round(width * scale)), max(1, round(height * scale))
        return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.LANCZOS))


@dataclass(frozen=True)
class Video:
    """A video file, a network stream, a pipe or a camera.

    Attributes:
        path: file, URL or device.
        root: folder from which the name of the output folder is derived.
    """

    path: str
    root: str

    def fingerprint(self) -> dict[str, object]:
        """Return facts that change when the video changes; a live source is always new."""
        if video.is_live(self.path):
            return _remote_file(self.path) or {"started": time.time()}
        return _fingerprint(self.path)

    def count(self, selection: Selection) -> int | None:
        """Estimate the number of pairs; None if the header does not say."""
        if video.is_live(self.path):
            return None
        facts = video.facts(self.path)
        if facts.frames is None:
            return None

        def at(position: Position) -> float:
            return position.value * (facts.rate or 25 if position.seconds else 1)

        frames: float = facts.frames
        if selection.end is not None:
            frames = min(frames, at(selection.end))
        frames = max(0, frames - at(selection.start))
        if selection.fps and facts.rate:
            frames *= selection.fps / facts.rate
        return max(0, round(frames) - selection.step)

    def pairs(self, selection: Selection, warn: Warn) -> Iterator[Pair]:
        """Yield the pairs; raise SourceError after them if parts of the video are lost."""
        stem = PurePath(storage.without_query(self.path)).stem
        frames = _within(
            video.frames(self.path, deinterlace=selection.deinterlace, warn=warn), selection
        )
        if selection.fps:
            frames = _resampled(frames, selection.fps)
        source_frames = (
            SourceFrame(
                number,
                str(frame.number),
                shown,
                selection.frame(frame.pixels, f"{self.path}, frame {frame.number}"),
                frame.continuous,
            )
            for number, shown, frame in frames
        )
        try:
            yield from _windows(self.path, lambda _: stem, source_frames, selection.step)
        except video.VideoError as error:
            raise SourceError(str(error)) from error


@dataclass(frozen=True)
class Frames:
    """Image files, one for each frame, in the order of the numbers in their names.

    Attributes:
        path: the folder.
        files: the paths of the files.
        root: folder from which the name of the output folder is derived.
    """

    path: str
    files: tuple[str, ...]
    root: str

    def fingerprint(self) -> dict[str, object]:
        """Return facts that change when a file changes."""
        digest = hashlib.sha256()
        for file in self.files:
            line = f"{_base(file)} {storage.fingerprint(file)}\n"
            digest.update(line.encode(errors="surrogateescape"))
        return {"files": len(self.files), "sha256": digest.hexdigest()}

    def count(self, selection: Selection) -> int:
        """Return the number of pairs."""
        return sum(1 for _ in self.pairs(selection, lambda _: None))

    def pairs(self, selection: Selection, warn: Warn) -> Iterator[Pair]:
        """Yield the pairs; with a dataset's names, only pairs within a scene."""
        chosen = self.files[selection.frame_range(self.path)]
        offset = int(selection.start.value)
        scenes = [_scene(file) for file in self.files]
        apart = None not in scenes and len(set(scenes)) > 1
        if apart:
            warn(
                f"{self.path}: names such as {_base(self.files[0])} are of image pairs of many "
                "scenes, so frames of different scenes make no pair"
            )
        else:
            _warn_of_gaps(self.path, self.files, warn)
        source_frames = (
            SourceFrame(
                number,
                _base(file),
                None,
                selection.frame(file, file),
                not apart or number == offset or scenes[number] == scenes[number - 1],
            )
            for number, file in enumerate(chosen, offset)
        )
        named = self.files[0] if len(self.files) == 1 else self.path
        return _windows(
            named, lambda frame: PurePath(frame.name).stem, source_frames, selection.step
        )


@dataclass(frozen=True)
class PairList:
    """A text file with `image1 image2 [output]` per line.

    Attributes:
        path: the list.
        root: folder from which the name of the output folder is derived.
    """

    path: str
    root: str

    def fingerprint(self) -> dict[str, object]:
        """Return facts that change when the list or one of its local images changes."""
        digest = hashlib.sha256()
        for listed in lists.read_pairs(self.path):
            for image in (listed.first, listed.second):
                if not storage.is_url(image):
                    digest.update(str(storage.fingerprint(image)).encode())
        return {**_fingerprint(self.path), "images": digest.hexdigest()}

    def count(self, selection: Selection) -> int:
        """Return the number of pairs."""
        return len(lists.read_pairs(self.path)[selection.frame_range(self.path)])

    def pairs(self, selection: Selection, warn: Warn) -> Iterator[Pair]:
        """Yield the pairs; raise SourceError or ListError if the file is not such a list."""
        del warn
        chosen = selection.frame_range(self.path)
        listed = lists.read_pairs(self.path)
        for number in range(*chosen.indices(len(listed))):
            pair = listed[number]
            first, second = (
                SourceFrame(number, path, None, selection.frame(path, path))
                for path in (pair.first, pair.second)
            )
            stem = PurePath(_base(pair.first)).stem
            yield Pair(number, stem, first, second, pair.output, pair.line)


Source = Video | Frames | PairList


def _within(
    frames: Iterable[video.VideoFrame], selection: Selection
) -> Iterator[tuple[int, float, video.VideoFrame]]:
    """Yield the frames from start to end, with their numbers and times."""
    first: float | None = None
    for frame in frames:
        first = frame.time if first is None else first

        def reached(
            position: Position, frame: video.VideoFrame = frame, first: float = first
        ) -> bool:
            place = frame.time - first + 1e-6 if position.seconds else frame.number
            return place >= position.value

        if selection.end is not None and reached(selection.end):
            return
        if reached(selection.start):
            yield frame.number, frame.time, frame


def _resampled(
    frames: Iterable[tuple[int, float, video.VideoFrame]], fps: float
) -> Iterator[tuple[int, float, video.VideoFrame]]:
    """Yield, for each tick of a clock, the tick's number and the frame shown at that time."""
    tick, origin, broken = 0, 0.0, False
    previous: video.VideoFrame | None = None

    def shown_until(end: float) -> Iterator[tuple[int, float, video.VideoFrame]]:
        nonlocal tick, broken
        assert previous is not None
        while (now := origin + tick / fps) < end - 1e-6:
            yield tick, now, replace(previous, continuous=not broken)
            tick, broken = tick + 1, False

    for _, shown, frame in frames:
        if previous is None:
            origin = shown
        elif previous.time < shown <= previous.time + _LONGEST_GAP_SECONDS:
            yield from shown_until(shown)
        else:  # a cut between two recordings
            yield from shown_until(previous.time + 1 / fps)
            origin = shown - tick / fps
        previous = frame
        broken = broken or not frame.continuous
    if previous is not None:
        yield from shown_until(previous.time + 2e-6)


def _windows(
    path: str,
    stem: Callable[[SourceFrame], str],
    frames: Iterable[SourceFrame],
    step: int,
) -> Iterator[Pair]:
    """Yield pairs of frames that are `step` apart, with none missing between them."""
    window: deque[SourceFrame] = deque(maxlen=step + 1)
    number = 0
    for frame in frames:
        number += 1
        if not frame.continuous:
            window.clear()
        window.append(frame)
        if len(window) > step:
            yield Pair(window[0].number, stem(window[0]), window[0], frame)
    if number <= step:
        raise SourceError(
            f"{path} has {number} frame{'s' * (number != 1)} to pair, and {step + 1} are needed"
        )


# Names of image pairs and short sequences of many scenes in one folder: KITTI, HD1K,
# FlyingChairs, and FlyingChairs2 with ChairsSDHom. Frames of different scenes make no pair.
_SCENES = (
    re.compile(r"(\d{6})_[0-2]\d"),
    re.compile(r"(\d{6})_\d{4}"),
    re.compile(r"(\d{5})_img[12]"),
    re.compile(r"(\d{7})-img_[01]"),
)


def _scene(file: str) -> str | None:
    stem = PurePath(_base(file)).stem
    return next((match[1] for form in _SCENES if (match := form.fullmatch(stem))), None)


def _warn_of_gaps(path: str, files: tuple[str, ...], warn: Warn) -> None:
    """Warn of gaps in the frame numbers of a sequence."""
    numbers = []
    for file in files:
        match = re.fullmatch(r"(.*?)(\d+)(\D*)", PurePath(_base(file)).stem)
        if not match or len(match[2]) > _LONGEST_NUMBER:
            return
        numbers.append((int(match[2]), match[1], match[3]))
    if len({(prefix, suffix) for _, prefix, suffix in numbers}) != 1:
        return
    steps = [second[0] - first[0] for first, second in itertools.pairwise(numbers)]
    if not steps:
        return
    (usual, _), *_ = sorted(Counter(steps).most_common(), key=lambda item: (-item[1], item[0]))
    gaps = [place for place, step in enumerate(steps) if step >= 1.5 * max(usual, 1)]
    if gaps:
        named = [f"{_base(files[place])} and {_base(files[place + 1])}" for place in gaps[:3]]
        more = f" and at {len(gaps) - 3} more places" if len(gaps) > 3 else ""
        warn(f"{path}: frames are missing between {', '.join(named)}{more}")


def _remote_file(path: str) -> dict[str, object] | None:
    """Return size and version of a file on a web server; None for a stream."""
    if not path.lower().startswith(("http://", "https://")):
        return None
    try:
        request = urllib.request.Request(path, method="HEAD")  # noqa: S310
        with urllib.request.urlopen(request, timeout=_HEAD_SECONDS) as response:  # noqa: S310
            headers = response.headers
    except (OSError, ValueError, urllib.error.URLError):
        return None
    if "Content-Length" not in headers:
        return None
    version = headers.get("ETag") or headers.get("Last-Modified") or ""
    return {"size": int(headers["Content-Length"]), "version": version}


def _fingerprint(path: str) -> dict[str, object]:
    fingerprint = storage.fingerprint(path)
    if fingerprint is None:
        raise SourceError(f"{path} does not exist")
    return fingerprint


def _base(path: str) -> str:
    return path.rpartition("/")[2]

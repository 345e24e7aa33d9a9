"""What to read: videos, folders of frames, lists of pairs, cameras, as pairs of images in order."""

import hashlib
import itertools
import os
import re
import shlex
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import PurePath

from flownet2 import storage, video
from flownet2.errors import Error
from flownet2.images import Frame, Pixels, shrunk

IMAGES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".ppm", ".pgm", ".tif", ".tiff"}
VIDEOS = {".mp4", ".avi", ".mkv", ".mov", ".webm", ".m4v", ".mpg", ".mpeg", ".ts", ".wmv", ".flv"}
CAMERA = re.compile(r"camera:(\d+)")


class SourceError(Error):
    """A source that cannot be read, or not to its end; the message names it and what to do."""


@dataclass(frozen=True)
class Shot:
    """A frame of a source: what it is called, and when it is shown, in seconds."""

    number: int
    name: str
    time: float | None
    frame: Frame


@dataclass(frozen=True)
class Pair:
    """Two frames between which flow is wanted; `stem` names its files."""

    number: int
    stem: str
    first: Shot
    second: Shot


@dataclass(frozen=True)
class Selection:
    """Which frames of a source make pairs: those `step` apart, of `start` up to before `end`.

    Frames whose longer edge exceeds `max_edge` are reduced to it.
    """

    step: int = 1
    start: int = 0
    end: int | None = None
    max_edge: int | None = None

    def pairs(self, frames: int) -> int:
        """How many pairs so many frames make."""
        return max(0, len(range(frames)[self.start : self.end]) - self.step)


@dataclass(frozen=True)
class Video:
    """A video file, or a camera."""

    path: str

    def identity(self) -> dict[str, object]:
        """What tells that it is still the same."""
        if self.path.startswith("/dev/"):
            return {"began": time.time()}  # what a camera shows does not come back
        return _identity(self.path)

    def count(self, selection: Selection) -> int | None:
        """How many pairs there are, roughly; None where nobody knows."""
        frames = None if self.path.startswith("/dev/") else video.count(self.path)
        return None if frames is None else selection.pairs(frames)

    def pairs(self, selection: Selection) -> Iterator[Pair]:
        """The pairs; SourceError where it ends badly, after all that can be read."""

        def shots() -> Iterator[Shot]:
            for one in video.frames(self.path):
                frame = _frame(one.pixels, selection, f"{self.path}, frame {one.number}")
                yield Shot(one.number, str(one.number), one.time, frame)

        try:
            yield from _windows(self.path, shots(), selection)
        except video.VideoError as error:
            raise SourceError(str(error)) from error


@dataclass(frozen=True)
class Frames:
    """Image files, one a frame."""

    path: str
    files: tuple[str, ...]

    def identity(self) -> dict[str, object]:
        """What tells that they are still the same."""
        digest = hashlib.sha256()
        for file in self.files:
            digest.update(f"{file} {storage.identity(file)}\n".encode())
        return {"files": len(self.files), "sha256": digest.hexdigest()}

    def count(self, selection: Selection) -> int:
        """How many pairs there are."""
        return selection.pairs(len(self.files))

    def pairs(self, selection: Selection) -> Iterator[Pair]:
        """The pairs; SourceError where there are too few frames."""
        shots = (
            Shot(number, PurePath(file).name, None, _frame(file, selection, file))
            for number, file in enumerate(self.files)
        )
        return _windows(self.path, shots, selection)


@dataclass(frozen=True)
class PairList:
    """A text file with `image1 image2 [output]` a line; the name of the output may be left out."""

    path: str

    def identity(self) -> dict[str, object]:
        """What tells that it is still the same."""
        return _identity(self.path)

    def count(self, selection: Selection) -> int:
        """How many pairs there are."""
        return len(self._lines()[selection.start : selection.end])

    def pairs(self, selection: Selection) -> Iterator[Pair]:
        """The pairs; SourceError where it is no such list."""
        for number, (first, second, stem) in enumerate(self._lines()):
            if number >= selection.start and (selection.end is None or number < selection.end):
                shots = (
                    Shot(number, path, None, _frame(path, selection, path))
                    for path in (first, second)
                )
                yield Pair(number, stem or f"{number:06}", *shots)

    def _lines(self) -> list[tuple[str, str, str]]:
        try:
            text = storage.read(self.path).decode()
        except FileNotFoundError as error:
            raise SourceError(f"{self.path} does not exist") from error
        except (OSError, UnicodeDecodeError) as error:
            raise SourceError(f"{self.path} cannot be read as a list of pairs: {error}") from error
        found = []
        for number, line in enumerate(text.splitlines(), 1):
            words = shlex.split(line, comments=True)
            if not words:
                continue
            stem = os.path.splitext(words[2])[0] if len(words) == 3 else ""
            if len(words) not in (2, 3) or os.path.isabs(stem) or ".." in PurePath(stem).parts:
                raise SourceError(
                    f"{self.path}, line {number}: give two images, and no more than "
                    "the name of an output below the output folder"
                )
            found.append((self._beside(words[0]), self._beside(words[1]), stem))
        return found

    def _beside(self, path: str) -> str:
        """A path of the list: from where the command runs, or else from where the list lies."""
        if storage.is_url(path) or os.path.exists(path):
            return path
        return storage.join(self.path.rpartition("/")[0] or ".", path)


Source = Video | Frames | PairList


def _frame(source: str | Callable[[], Pixels], selection: Selection, name: str) -> Frame:
    frame = Frame(source, name)
    if selection.max_edge is None:
        return frame
    longest = selection.max_edge
    return Frame(lambda: shrunk(frame.pixels(), longest), name)


def _windows(path: str, shots: Iterable[Shot], selection: Selection) -> Iterator[Pair]:
    """Pairs of shots that are `step` apart."""
    window: deque[Shot] = deque(maxlen=selection.step + 1)
    number = 0
    for shot in itertools.islice(shots, selection.start, selection.end):
        number += 1
        window.append(shot)
        if len(window) > selection.step:
            yield Pair(window[0].number, f"{window[0].number:06}", window[0], shot)
    if number <= selection.step:
        raise SourceError(
            f"{path} has {number} frame{'s' * (number != 1)} to pair, and "
            f"{selection.step + 1} are needed"
        )


def _identity(path: str) -> dict[str, object]:
    identity = storage.identity(path)
    if identity is None:
        raise SourceError(f"{path} does not exist")
    return identity


def find(arguments: Iterable[str]) -> dict[str, Source]:
    """The sources that arguments name, each with a name of its own for its folder.

    Raises:
        SourceError: an argument names nothing that can be read.
    """
    found: list[Source] = []
    images: dict[str, list[str]] = {}
    for argument in arguments:
        camera = CAMERA.fullmatch(argument)
        if camera:
            found.append(Video(f"/dev/video{camera[1]}"))
            continue
        paths = storage.matching(argument) if re.search(r"[*?\[]", argument) else [argument]
        if not paths:
            raise SourceError(f"{argument} matches no file")
        for path in paths:
            if storage.is_folder(path):
                found += _in_folder(path)
            elif _suffix(path) in IMAGES:
                if storage.identity(path) is None:
                    raise SourceError(f"{path} does not exist")
                images.setdefault(path.rpartition("/")[0] or ".", []).append(path)
            elif _suffix(path) in (".txt", ".list"):
                found.append(PairList(path))
            else:
                found.append(Video(path))
    found += [Frames(folder, tuple(sorted(files, key=natural))) for folder, files in images.items()]
    return _named(found)


def _in_folder(path: str) -> list[Source]:
    files = sorted(storage.files(path), key=natural)
    frames = [file for file in files if _suffix(file) in IMAGES]
    if frames:
        return [Frames(path, tuple(frames))]
    videos: list[Source] = [Video(file) for file in files if _suffix(file) in VIDEOS]
    if not videos:
        raise SourceError(f"{path} holds no images and no videos")
    return videos


def _named(sources: list[Source]) -> dict[str, Source]:
    """Sources by the last part of their path, or by more of it where that is not enough."""
    paths = [os.path.abspath(source.path) for source in sources]
    stems = [PurePath(path).stem for path in paths]
    names: dict[str, Source] = {}
    for source, path, stem in zip(sources, paths, stems, strict=True):
        apart = os.path.relpath(path, os.path.commonpath(paths)).replace("/", "_")
        name = stem if stems.count(stem) == 1 else apart
        if name in names or name == ".":
            raise SourceError(f"{source.path} is given twice")
        names[name] = source
    return names


def natural(path: str) -> list[tuple[str, int]]:
    """A key that sorts frame2 before frame10."""
    return [(text, int(digits or -1)) for text, digits in re.findall(r"(\D*)(\d*)", path)]


def _suffix(path: str) -> str:
    return os.path.splitext(path)[1].lower()

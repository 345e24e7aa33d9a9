"""Finding sources: videos, folders of frames and lists, and names for their output folders."""

import hashlib
import itertools
import json
import os
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from typing import Literal

from PIL import Image

from flownet2 import lists, storage, video
from flownet2.pairs import Frames, PairList, Source, SourceError, Video, Warn

# Files whose suffix says what they are; all others are opened to find out.
IMAGES = {".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".ppm", ".pgm", ".pnm", ".tif"}
IMAGES |= {".tiff", ".avif", ".jp2"}
VIDEOS = {".mp4", ".avi", ".mkv", ".mov", ".webm", ".m4v", ".mpg", ".mpeg", ".ts", ".wmv", ".flv"}
VIDEOS |= {".3gp", ".3g2", ".mts", ".m2ts", ".y4m", ".vob", ".mxf", ".ogv", ".asf"}
LISTS = {".txt", ".list", ".lst"}
CAMERA = re.compile(r"camera:(\d+)")

_LEFT_OUT = 3
"""Files that a message names before it counts the others."""


def find(
    arguments: Iterable[str], warn: Warn = lambda _: None, exclude: Collection[str] = ()
) -> dict[str, Source]:
    """Find the sources that arguments name.

    An argument is a path, a URL, a pattern, `camera:N`, or "-" for standard input. A path that
    exists is never taken as a pattern. Folders are searched recursively.

    Args:
        arguments: the command's arguments.
        warn: receives a line if files in folders are left out.
        exclude: folders to skip, such as that of the results.

    Returns:
        The sources by the names of their output folders, in natural order of the names.

    Raises:
        SourceError: an argument names nothing that can be read.
    """
    search = _Search({os.path.realpath(_absolute(path)) for path in exclude})
    for argument in arguments:
        search.add(argument)
    if search.left_out:
        named = ", ".join(search.left_out[:_LEFT_OUT])
        more = len(search.left_out) - _LEFT_OUT
        warn(
            f"left out, neither images nor videos: {named}"
            + (f" and {more} more" if more > 0 else "")
        )
    return _named(search.sources())


def shard(sources: Mapping[str, Source], index: int, count: int) -> dict[str, Source]:
    """Return the sources of one of `count` machines.

    The shard depends on the name only, so machines that list files in another order agree.
    """
    return {
        name: source
        for name, source in sources.items()
        if int(hashlib.sha256(name.encode(errors="surrogateescape")).hexdigest(), 16) % count
        == index
    }


def natural(path: str) -> list[tuple[str, int, str]]:
    """Return a sort key that puts frame2 before frame10."""
    return [(text, int(digits or -1), digits) for text, digits in re.findall(r"(\D*)(\d*)", path)]


class _Search:
    """Collects sources from arguments."""

    def __init__(self, exclude: set[str]) -> None:
        self.left_out: list[str] = []
        self._exclude = exclude
        self._others: list[Source] = []
        self._images: dict[tuple[str, str], list[str]] = {}
        """Image files by folder and root."""
        self._visited: set[str] = set()

    def sources(self) -> list[Source]:
        frames: list[Source] = []
        for (folder, root), files in self._images.items():
            ordered = sorted(files, key=lambda file: natural(file.rpartition("/")[2]))
            for first, second in itertools.pairwise(ordered):
                if first == second:
                    raise SourceError(f"{first} is given twice")
            frames.append(Frames(folder, tuple(ordered), root))
        return [*self._others, *frames]

    def add(self, argument: str) -> None:
        camera = CAMERA.fullmatch(argument)
        if camera:
            self._others.append(Video(f"/dev/video{camera[1]}", "/dev"))
        elif argument == video.PIPE:
            self._others.append(Video(video.PIPE, "."))
        elif video.is_network(argument) and _suffix(argument) not in IMAGES | LISTS:
            self._others.append(Video(argument, storage.parent(argument)))
        elif storage.exists(argument):
            self._add_path(argument)
        elif storage.is_pattern(argument) and (found := storage.matching(argument)):
            for path in found:
                self._add_path(path)
        elif storage.is_pattern(argument):
            raise SourceError(f"{argument} matches no file")
        else:  # reading it raises the error
            self._others.append(Video(argument, storage.parent(argument)))

    def _add_path(self, path: str, root: str | None = None) -> None:
        """Add a file or folder that was named."""
        if storage.is_folder(path):
            before = len(self._others) + len(self._images), len(self.left_out)
            self._add_folder(path.rstrip("/") or "/", path.rstrip("/") or "/")
            if before[0] == len(self._others) + len(self._images):
                left = len(self.left_out) - before[1]
                raise SourceError(
                    f"{path} holds no images and no videos"
                    + (f", but {left} other files" if left else "")
                )
            return
        folder = root or storage.parent(path)
        if _suffix(path) in LISTS:
            self._add_list(path)
            return
        kind = _kind(path)
        if kind == "image":
            self._add_image(path, folder)
        elif kind == "video":
            self._others.append(Video(path, folder))
        elif not video.is_video(path) and _is_text(path):
            self._add_list(path)
        else:  # reading it raises the error
            self._others.append(Video(path, folder))

    def _add_list(self, path: str) -> None:
        listed = lists.read_sources(path)
        if listed is None:
            self._others.append(PairList(path, storage.parent(path)))
            return
        folder = storage.parent(path)
        for source in listed:
            root = folder if source.startswith(f"{folder}/") else None
            if storage.exists(source):
                self._add_path(source, root)
            else:
                self._others.append(Video(source, root or storage.parent(source)))

    def _add_image(self, path: str, root: str) -> None:
        self._images.setdefault((storage.parent(path), root), []).append(path)

    def _add_folder(self, folder: str, root: str) -> None:
        """Add the videos and frames of a folder and its subfolders."""
        where = os.path.realpath(_absolute(folder))
        if where in self._exclude and folder == root:
            raise SourceError(f"{folder} is also the folder of the results: choose another folder")
        if where in self._visited or where in self._exclude:
            return
        if folder != root and _holds_results(folder):
            self.left_out.append(f"{folder}/ (results of a run)")
            return
        self._visited.add(where)
        files, folders = storage.listing(folder)
        for file in files:
            kind = _kind(file)
            if kind == "image":
                self._add_image(file, root)
            elif kind == "video":
                self._others.append(Video(file, root))
            else:
                self.left_out.append(file)
        for inner in folders:
            self._add_folder(inner, root)


def _kind(path: str) -> Literal["image", "video", "other"]:
    """Decide by suffix, or by content if the suffix is unknown or may mean both."""
    suffix = _suffix(path)
    if suffix in IMAGES:
        return "image"
    if suffix in VIDEOS:
        return "video"
    try:
        with storage.open_file(path) as file, Image.open(file) as image:
            image.load()
            animated = suffix == ".gif" and getattr(image, "n_frames", 1) > 1
            return "video" if animated else "image"
    except storage.StorageError:
        return "other"
    except Exception:
        return "video" if video.is_video(path) else "other"


def _is_text(path: str) -> bool:
    with storage.open_file(path) as file:
        start = file.read(4096)
    return b"\0" not in start or start.startswith((b"\xff\xfe", b"\xfe\xff"))


def _holds_results(folder: str) -> bool:
    """Return True if a folder is the output of a run."""
    try:
        manifest = json.loads(storage.read(storage.join(folder, "manifest.json")))
    except (storage.StorageError, ValueError):
        return False
    return isinstance(manifest, dict) and {"options", "model", "sources"} <= manifest.keys()


def _named(sources: list[Source]) -> dict[str, Source]:
    """Name sources by their paths, as far as needed to tell them apart.

    In order of preference, a name is the path below the source's root without suffix, the same with
    suffix, the path below the folder that all sources share without suffix, or the same with
    suffix.
    """
    paths = [_absolute(source.path) for source in sources]
    shared = os.path.commonpath([os.path.dirname(path) for path in paths]) if paths else ""
    candidates = []
    for source, path in zip(sources, paths, strict=True):
        below = os.path.relpath(path, _absolute(source.root))
        if below == ".":  # frames directly in the given folder
            below = os.path.basename(path) or "frames"
        if source.path == video.PIPE:
            below = "stdin"
        from_shared = os.path.relpath(path, shared)
        is_file = not isinstance(source, Frames)
        candidates.append([_bare(below, is_file), below, _bare(from_shared, is_file), from_shared])
    level = [0] * len(sources)
    for _ in range(3):
        names = [names[place] for names, place in zip(candidates, level, strict=True)]
        counts = Counter(names)
        level = [
            place + (counts[name] > 1) if place < 3 else place
            for name, place in zip(names, level, strict=True)
        ]
    named: dict[str, Source] = {}
    for source, names, place in zip(sources, candidates, level, strict=True):
        name = names[place]
        if name in named:
            raise SourceError(
                f"{source.path} is given twice"
                if source.path == named[name].path
                else f"{named[name].path} and {source.path} have the same name: process them "
                "separately"
            )
        named[name] = source
    return dict(sorted(named.items(), key=lambda item: natural(item[0])))


def _bare(path: str, is_file: bool) -> str:
    return os.path.splitext(storage.without_query(path))[0] if is_file else path


def _absolute(path: str) -> str:
    if storage.is_url(path):
        return "/" + path.replace("://", "/", 1).rstrip("/")
    return os.path.abspath(path)


def _suffix(path: str) -> str:
    return os.path.splitext(storage.without_query(path))[1].lower()

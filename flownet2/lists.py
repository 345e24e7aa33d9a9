"""Text files that list pairs of images, or sources, one per line.

A line has fields separated by tabs or, without tabs, by spaces. A field that begins with a
quotation mark ends at the next one. Nothing else is special in a line: apostrophes, backslashes and
`#` are parts of names. Empty lines are skipped, and so are lines that begin with `#`, unless that
is the name of an existing file. The text is UTF-8 or UTF-16; other bytes are taken as the file
system has them, or as Windows-1252. Relative paths are resolved from the current folder or else
from the list's folder.
"""

import codecs
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath

from PIL import Image

from flownet2 import storage
from flownet2.errors import Error
from flownet2.formats import FORMATS

_FIELD = re.compile(r"""\s*(?:"([^"]+)"(?=\s|$)|'([^']+)'(?=\s|$)|(\S+))""")
_SUFFIXES = {format.suffix for format in FORMATS.values()} | {".jpg", ".h5", ".hdf5", ".flo5"}


class ListError(Error):
    """Raised when a list cannot be read; the message names the line."""


@dataclass(frozen=True)
class ListedPair:
    """A line of a list of pairs: its number, two images, and the name of the output or ""."""

    line: int
    first: str
    second: str
    output: str


def read_pairs(path: str) -> list[ListedPair]:
    """Read a list with `image1 image2 [output]` per line.

    Raises:
        ListError: a line has another form, or there is no line.
        StorageError: the list cannot be read.
    """
    pairs = [_pair(path, number, line) for number, line in _lines(path)]
    if not pairs:
        raise ListError(f"{path} lists nothing: give two images per line")
    return pairs


def read_sources(path: str) -> list[str] | None:
    """Return the paths in a list of videos or folders; None if the file is a list of pairs.

    A line is a path, which class numbers may follow, as in the lists of UCF-101 and Kinetics.

    Raises:
        ListError: only some of the lines have this form, or there is no line.
        StorageError: the list cannot be read.
    """
    sources: list[str] = []
    other = 0
    for number, line in _lines(path):
        source = _source(path, line)
        if source is None:
            other = other or number
        elif not source.exists and not other and _is_image(source.path):
            raise ListError(
                f"{path}, line {number}: {source.path} does not exist. Give two images, or a video"
            )
        else:
            sources.append(source.path)
        if sources and other:
            raise ListError(
                f"{path}, line {other}: give a path on every line, or two images on every line"
            )
    if not sources and not other:
        raise ListError(f"{path} lists nothing: give a path, or two images, per line")
    return sources or None


def _is_image(path: str) -> bool:
    return os.path.splitext(path)[1].lower() in Image.registered_extensions()


def _source(path: str, line: str) -> "_Resolved | None":
    """Return the path on a line; None if it has other fields."""
    whole = _Resolved(path, _unquoted(line.strip()))
    if whole.exists:
        return whole
    first, *labels = _fields(line)
    return _Resolved(path, first) if all(label.isdecimal() for label in labels) else None


def _pair(path: str, number: int, line: str) -> ListedPair:
    readings = [fields for fields in _readings(line) if len(fields) in (2, 3)]
    if not readings:
        raise ListError(
            f"{path}, line {number}: give two images, and no more than the name of an output. "
            "Separate them by tabs if names contain spaces"
        )
    candidates = [
        ([_Resolved(path, field) for field in fields[:2]], "".join(fields[2:]))
        for fields in readings
    ]
    images, output = next(
        (found for found in candidates if all(image.exists for image in found[0])), candidates[0]
    )
    if any(image.from_windows for image in images):
        output = output.replace("\\", "/")
    return ListedPair(number, images[0].path, images[1].path, _stem(path, number, output))


def _stem(path: str, number: int, output: str) -> str:
    """Return the name of an output without the suffix of a flow's format."""
    base, suffix = os.path.splitext(output)
    stem = base if suffix.lower() in _SUFFIXES else output
    parts = PurePosixPath(stem).parts
    if stem and (
        stem.endswith("/")
        or "\0" in stem
        or any(part.startswith((".", "/", "#")) for part in parts)
    ):
        raise ListError(
            f"{path}, line {number}: {output!r} is not the name of an output: give a path below "
            "the output folder whose parts do not begin with a dot or #"
        )
    return "/".join(parts)


def _lines(path: str) -> Iterator[tuple[int, str]]:
    """Number the lines that hold fields."""
    for number, line in enumerate(re.split(r"\r\n|\n|\r", _text(path)), 1):
        if not line.strip():
            continue
        if line.startswith("#") and not _Resolved(path, _fields(line)[0]).exists:
            continue
        yield number, line


def _text(path: str) -> str:
    content = storage.read(path)
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return content.decode("utf-16", errors="replace")
    if b"\0" in content:
        raise ListError(f"{path} is not a text file: give a list, a video or images")
    return content.removeprefix(codecs.BOM_UTF8).decode("utf-8", errors="surrogateescape")


def _readings(line: str) -> Iterator[list[str]]:
    """Split a line at its tabs, and at all white space."""
    if "\t" in line.strip():
        yield [_unquoted(field.strip()) for field in line.split("\t") if field.strip()]
    yield _fields(line)


def _fields(line: str) -> list[str]:
    return ["".join(match.groups(default="")) for match in _FIELD.finditer(line.rstrip())]


def _unquoted(field: str) -> str:
    quoted = len(field) > 2 and field[0] in "\"'" and field[0] == field[-1]
    return field[1:-1] if quoted else field


class _Resolved:
    """The file that a path in a list refers to.

    Attributes:
        path: the path to open.
        exists: whether the file exists; assumed for URLs.
        from_windows: whether backslashes were taken as separators to find it.
    """

    def __init__(self, list_path: str, name: str) -> None:
        self.path = name
        self.exists = True
        self.from_windows = False
        if storage.is_url(name):
            return
        folder = storage.parent(list_path)
        if storage.is_url(folder):
            self.path = name if os.path.exists(name) else storage.join(folder, name)
            return
        for spelling in _spellings(name):
            for path in (spelling, storage.join(folder, spelling)):
                if os.path.exists(path):
                    self.path = path
                    self.from_windows = "\\" in name and "\\" not in spelling
                    return
        self.path = storage.join(folder, name)
        self.exists = False


def _spellings(name: str) -> Iterator[str]:
    """Yield a name unchanged, then with Windows' separators and Windows' encoding converted."""
    yield name
    if "\\" in name:
        yield name.replace("\\", "/")
    try:
        decoded = name.encode("utf-8", "surrogateescape").decode("cp1252")
    except UnicodeDecodeError:
        return
    if "\udc80" <= max(name, default="") <= "\udcff":
        yield decoded
        yield decoded.replace("\\", "/")

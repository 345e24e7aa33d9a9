"""Progress of a run, for resuming: `manifest.json` of its folder, `index.csv` of each source.

The manifest records options, network and fingerprints of the sources. The index has a line for each
complete file and is written after the file. A run that is started again compares the manifest and
computes what the index lacks. Both files are checked when read, because other programs may have
changed them.
"""

import csv
import io
import json
import math
import os
import time
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import astuple, dataclass, fields
from pathlib import Path, PurePosixPath
from typing import Any

from flownet2 import storage
from flownet2.errors import Error

MANIFEST = "manifest.json"
INDEX = "index.csv"
REWRITE_SECONDS = 10.0
"""Interval at which the index is written to storage that cannot append."""


class ManifestError(Error):
    """Raised when the output folder belongs to another run; the message says what differs."""


def update_manifest(folder: str, facts: Mapping[str, Any], sources: Mapping[str, Any]) -> None:
    """Write the manifest of a folder, or check that the existing one agrees.

    Several processes may do this at once for shards of the same sources: they write the same
    content.

    Args:
        folder: the output folder.
        facts: options and model, which apply to all files.
        sources: fingerprint of each source, by the name of its folder.

    Raises:
        ManifestError: facts differ, or a source has changed or is another one.
    """
    before = read_manifest(folder)
    for name, fact in json.loads(json.dumps(facts)).items():
        if name in before and before[name] != fact:
            raise ManifestError(
                f"{folder} holds results of another run ({name}: "
                f"{_difference(before[name], fact)}): choose another folder, or --overwrite"
            )
    known = before.get("sources", {})
    for name, source in json.loads(json.dumps(sources)).items():
        if name not in known:
            continue
        results = storage.join(folder, name)
        if "started" in source:
            if storage.exists(storage.join(results, INDEX)):
                raise ManifestError(
                    f"{source['path']} is live, so it cannot continue {results}: "
                    "choose another folder, or --overwrite"
                )
        elif {**known[name], "path": ""} != {**source, "path": ""}:
            raise ManifestError(
                f"{results} holds results of {known[name]['path']}, which has "
                "changed or was another source: choose another folder, or --overwrite"
            )
    after = {**facts, "sources": {**sources, **known}}
    if json.loads(json.dumps(after)) != before:
        content = json.dumps(after, indent=1).encode()
        storage.write(storage.join(folder, MANIFEST), content, shared=True)


def remove_manifest(folder: str) -> None:
    """Remove the manifest so that the next run may differ; raise as `read_manifest` does."""
    read_manifest(folder)
    storage.remove(storage.join(folder, MANIFEST))


def read_manifest(folder: str) -> dict[str, Any]:
    """Return the manifest of a folder; {} if there is none.

    Raises:
        ManifestError: another program wrote the file.
    """
    path = storage.join(folder, MANIFEST)
    try:
        content = json.loads(storage.read(path))
    except storage.NotFound:
        return {}
    except (ValueError, RecursionError):
        content = None
    sources = content.get("sources") if isinstance(content, dict) else None
    if not isinstance(sources, dict) or not all(
        isinstance(source, dict) and isinstance(source.get("path"), str)
        for source in sources.values()
    ):
        raise ManifestError(f"{path} was not written by flownet2: choose another folder")
    manifest: dict[str, Any] = content
    return manifest


def _difference(before: Any, after: Any) -> str:
    if not isinstance(before, dict) or not isinstance(after, dict):
        return f"was {before}, is {after}"
    keys = [key for key in {**before, **after} if before.get(key) != after.get(key)]
    return ", ".join(f"{key} was {before.get(key)}, is {after.get(key)}" for key in keys)


@dataclass(frozen=True)
class Row:
    """A line of the index.

    Attributes:
        number: number of the pair; None for files of the whole source.
        first: name of the first frame.
        second: name of the second frame.
        time: presentation time of the first frame in seconds, if it has one.
        next_time: presentation time of the second frame in seconds, if it has one.
        file: path of the file below the source's folder.
        bytes: size of the file.
        crc32: its CRC-32, eight hexadecimal digits.
    """

    number: int | None
    first: str
    second: str
    time: float | None
    next_time: float | None
    file: str
    bytes: int
    crc32: str


_COLUMNS = tuple(field.name for field in fields(Row))


class Index:
    """The index of the folder of one source."""

    def __init__(self, folder: str) -> None:
        """Read the index, if there is one.

        Raises:
            ManifestError: another program wrote the file, or it names files outside the folder.
        """
        self._folder = folder
        self._path = storage.join(folder, INDEX)
        self._rows: dict[str, Row] = {}
        self._written = time.monotonic()
        self._behind = False
        try:
            text = storage.read(self._path).decode(errors="surrogateescape")
        except storage.NotFound:
            return
        self._rows = {row.file: row for row in self._parsed(text)}
        if not text.endswith("\n"):  # the last line was cut off by a kill
            self.rewrite()

    def _parsed(self, text: str) -> Iterable[Row]:
        lines = csv.reader(io.StringIO(text))
        try:
            columns = next(lines, [])
            if text.endswith("\n") and tuple(columns) != _COLUMNS:
                raise ManifestError(
                    f"{self._path} was not written by flownet2: choose another folder"
                )
            for values in lines:
                row = _row(values)
                if row is not None and not _is_inside(row.file):
                    raise ManifestError(
                        f"{self._path}, line {lines.line_num}: {row.file!r} is not a file of this "
                        "folder: choose another folder, or remove the line"
                    )
                if row is not None:
                    yield row
        except csv.Error as error:
            raise ManifestError(f"{self._path} is not an index: {error}") from error

    def rows(self) -> list[Row]:
        """Return all rows in the order of the source."""
        return sorted(
            self._rows.values(), key=lambda row: (row.number is None, row.number or 0, row.file)
        )

    def has(self, file: str) -> bool:
        """Return True if a file is unchanged; on remote storage only the sizes are compared."""
        row = self._rows.get(file)
        if row is None:
            return False
        path = storage.join(self._folder, file)
        if storage.is_url(path):
            found = storage.fingerprint(path)
            return found is not None and found["size"] == row.bytes
        try:
            return checksum(Path(path)) == (row.bytes, row.crc32)
        except OSError:
            return False

    def write(
        self,
        file: str,
        content: bytes,
        number: int | None = None,
        names: tuple[str, str] = ("", ""),
        times: tuple[float | None, float | None] = (None, None),
    ) -> None:
        """Write a file and then its line; see `Row`."""
        storage.write(storage.join(self._folder, file), content)
        self.note(Row(number, *names, *times, file, len(content), f"{zlib.crc32(content):08x}"))

    def note(self, row: Row) -> None:
        """Add the line of a file that exists."""
        self._rows[row.file] = row
        if storage.is_url(self._path):
            self._behind = True
            if time.monotonic() - self._written > REWRITE_SECONDS:
                self.rewrite()
            return
        new = not Path(self._path).exists()
        with Path(self._path).open(
            "a", encoding="utf-8", errors="surrogateescape", newline=""
        ) as lines:
            lines.write((_line(_COLUMNS) if new else "") + _line(astuple(row)))

    def drop(self, file: str) -> None:
        """Remove a file; its line goes when the index is next rewritten."""
        path = storage.join(self._folder, file)
        if not storage.is_url(path):
            here = os.path.realpath(self._folder)
            if os.path.commonpath([here, os.path.realpath(os.path.dirname(path))]) != here:
                raise ManifestError(
                    f"{path} lies outside of the folder through a link: choose another folder"
                )
        storage.remove(path)
        self._rows.pop(file, None)

    def rewrite(self) -> None:
        """Write all lines in order."""
        text = _line(_COLUMNS) + "".join(_line(astuple(row)) for row in self.rows())
        storage.write(self._path, text.encode(errors="surrogateescape"))
        self._written = time.monotonic()
        self._behind = False

    def flush(self) -> None:
        """Write the lines that are not written yet."""
        if self._behind:
            self.rewrite()

    def clear(self) -> None:
        """Remove all files of the index, and the index."""
        for file in list(self._rows):
            self.drop(file)
        storage.remove(self._path)


def _row(values: list[str]) -> Row | None:
    """Return a row; None for a line that was cut off."""
    try:
        number, first, second, shown, next_shown, file, size, crc32 = values
        if len(crc32) != 8:
            return None
        times = tuple(float(value) if value else None for value in (shown, next_shown))
        if any(value is not None and not math.isfinite(value) for value in times):
            return None
        return Row(
            int(number) if number else None,
            first,
            second,
            times[0],
            times[1],
            file,
            int(size),
            crc32,
        )
    except ValueError:
        return None


def _is_inside(file: str) -> bool:
    """Return True if a path from an index stays below the index's folder."""
    path = PurePosixPath(file)
    return bool(
        file
        and "\0" not in file
        and not path.is_absolute()
        and ".." not in path.parts
        and not storage.is_url(file)
    )


def _line(values: tuple[Any, ...]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(values)
    return text.getvalue()


def checksum(path: Path) -> tuple[int, str]:
    """Return the size and CRC-32 of a local file."""
    crc, size = 0, 0
    with path.open("rb") as file:
        while piece := file.read(2**20):
            crc, size = zlib.crc32(piece, crc), size + len(piece)
    return size, f"{crc:08x}"

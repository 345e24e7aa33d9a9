"""What a run has done: `manifest.json` of its output folder, `index.csv` of each source's.

The manifest says what is made of what: options, model, and the sources as they were. The index has
a line for each file that is there whole, written after the file. A run that is started again
compares the first, and does what the second does not have.
"""

import csv
import io
import json
import time
import zlib
from collections.abc import Mapping
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any

from flownet2 import storage
from flownet2.errors import Error

MANIFEST = "manifest.json"
INDEX = "index.csv"
REWRITE_SECONDS = 10.0
"""How often the index is written to storage that cannot append."""


class ManifestError(Error):
    """The output folder belongs to another run; the message says what differs."""


def agree(folder: str, facts: Mapping[str, Any], sources: Mapping[str, Any]) -> None:
    """Write the manifest of a folder, or check that the one that is there is the same.

    Several processes may do so at once, for parts of the same sources: they write the same.

    Args:
        folder: the output folder.
        facts: of all files, by name: the options and the model.
        sources: identity of each source, by the name of its folder.

    Raises:
        ManifestError: facts differ, or a source is another one or has changed.
    """
    path = storage.join(folder, MANIFEST)
    before = _read(path)
    for name, fact in json.loads(json.dumps(facts)).items():
        if name in before and before[name] != fact:
            raise ManifestError(
                f"{folder} holds results of another run ({name}: "
                f"{_difference(before[name], fact)}): choose another folder, or --overwrite"
            )
    known = before.get("sources", {})
    for name, source in json.loads(json.dumps(sources)).items():
        if name in known and known[name] != source:
            raise ManifestError(
                f"{storage.join(folder, name)} holds results of {known[name]['path']}, which has "
                "changed or was another file: choose another folder, or --overwrite"
            )
    after = {**facts, "sources": {**known, **sources}}
    if after != before:
        storage.write(path, json.dumps(after, indent=1).encode(), shared=True)


def forget(folder: str) -> None:
    """Remove the manifest, so that the next one may differ."""
    storage.remove(storage.join(folder, MANIFEST))


def _read(path: str) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(storage.read(path))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ManifestError(
            f"{path} is no manifest: choose another folder, or --overwrite"
        ) from error
    return content


def _difference(before: Any, after: Any) -> str:
    if not isinstance(before, dict) or not isinstance(after, dict):
        return f"was {before}, is {after}"
    keys = [key for key in {**before, **after} if before.get(key) != after.get(key)]
    return ", ".join(f"{key} was {before.get(key)}, is {after.get(key)}" for key in keys)


@dataclass(frozen=True)
class Row:
    """A file: of which frames it is, when they are shown (seconds), its size and CRC-32."""

    number: int | None
    first: str
    second: str
    time: float | None
    next_time: float | None
    file: str
    bytes: int
    crc32: str


class Index:
    """The index of one source's folder."""

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._path = storage.join(folder, INDEX)
        self._rows: dict[str, Row] = {}
        self._written = time.monotonic()
        self._behind = False
        try:
            text = storage.read(self._path).decode(errors="replace")
        except FileNotFoundError:
            return
        for line in csv.DictReader(io.StringIO(text)):
            row = _parse(line)
            if row is not None:
                self._rows[row.file] = row
        if not text.endswith("\n"):  # its writer was ended in the middle of a line
            self.rewrite()

    def rows(self) -> list[Row]:
        """All rows, in the order of the source."""
        return sorted(
            self._rows.values(), key=lambda row: (row.number is None, row.number or 0, row.file)
        )

    def has(self, file: str) -> bool:
        """Whether a file is there as it was written: by content, or by size where that is far."""
        row = self._rows.get(file)
        if row is None:
            return False
        path = storage.join(self._folder, file)
        if storage.is_url(path):
            identity = storage.identity(path)
            return identity is not None and identity["size"] == row.bytes
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
        """Write a file, and then its line."""
        storage.write(storage.join(self._folder, file), content)
        self.note(Row(number, *names, *times, file, len(content), f"{zlib.crc32(content):08x}"))

    def note(self, row: Row) -> None:
        """Write the line of a file that is there."""
        self._rows[row.file] = row
        if storage.is_url(self._path):
            self._behind = True
            if time.monotonic() - self._written > REWRITE_SECONDS:
                self.rewrite()
            return
        new = not Path(self._path).exists()
        with Path(self._path).open("a", encoding="utf-8", newline="") as lines:
            lines.write((_line(_COLUMNS) if new else "") + _line(astuple(row)))

    def drop(self, file: str) -> None:
        """Remove a file; its line goes when the index is written anew."""
        storage.remove(storage.join(self._folder, file))
        self._rows.pop(file, None)

    def rewrite(self) -> None:
        """Write the index in order."""
        text = _line(_COLUMNS) + "".join(_line(astuple(row)) for row in self.rows())
        storage.write(self._path, text.encode())
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


_COLUMNS = tuple(field.name for field in fields(Row))


def _parse(line: dict[str, str]) -> Row | None:
    """A row; None for a line that was cut off."""
    try:
        return Row(
            int(line["number"]) if line["number"] else None,
            line["first"],
            line["second"],
            float(line["time"]) if line["time"] else None,
            float(line["next_time"]) if line["next_time"] else None,
            line["file"],
            int(line["bytes"]),
            line["crc32"] if len(line["crc32"]) == 8 else "",
        )
    except (TypeError, ValueError, KeyError):
        return None


def _line(values: tuple[Any, ...]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(values)
    return text.getvalue()


def checksum(path: Path) -> tuple[int, str]:
    """Size and CRC-32 of a file of this machine."""
    crc, size = 0, 0
    with path.open("rb") as file:
        while piece := file.read(2**20):
            crc, size = zlib.crc32(piece, crc), size + len(piece)
    return size, f"{crc:08x}"

"""Files and folders on this machine, or on remote storage by URL (s3://…, gs://…, http://…).

Paths are strings. A path without a scheme is a local one; URLs go through fsspec. A path always
means the file of that name: only `matching` expands patterns.
"""

import contextlib
import glob
import io
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from flownet2.errors import Error, requires_extra
from flownet2.files import write_atomically


class StorageError(Error, OSError):
    """Raised when a file cannot be read, written or listed; the message names it."""


class NotFound(StorageError, FileNotFoundError):
    """Raised when a file does not exist."""


def is_url(path: str) -> bool:
    """Return True if the path has a scheme, such as s3://."""
    return "://" in path


def without_query(path: str) -> str:
    """Return a web address without `?…`; other paths as they are."""
    return path.partition("?")[0] if path.lower().startswith(("http://", "https://")) else path


def join(folder: str, name: str) -> str:
    """Return the path of a file in a folder."""
    return f"{folder.rstrip('/')}/{name}" if is_url(folder) else os.path.join(folder, name)


def parent(path: str) -> str:
    """Return the path of the folder that holds a file; "." for a bare name."""
    return path.rpartition("/")[0] or ("/" if path.startswith("/") else ".")


def read(path: str) -> bytes:
    """Return the content of a file; raise StorageError if it cannot be read."""
    with _accessing(path) as (filesystem, name):
        content: bytes = filesystem.cat_file(name) if filesystem else Path(name).read_bytes()
        return content


def open_file(path: str) -> IO[bytes]:
    """Open a file for reading and seeking; raise StorageError if that fails."""
    with _accessing(path) as (filesystem, name):
        file: IO[bytes] = (filesystem or io).open(name, "rb")
        return file


def write(path: str, content: bytes, shared: bool = False) -> None:
    """Write a file atomically, and create missing folders.

    Args:
        path: the file to write or to replace.
        content: its new content.
        shared: whether several processes may write the file at once; see `write_atomically`.

    Raises:
        StorageError: the file cannot be written.
    """
    with _accessing(path) as (filesystem, name):
        if filesystem:
            filesystem.makedirs(filesystem._parent(name), exist_ok=True)
            filesystem.pipe_file(name, content)
        else:
            write_atomically(name, content, shared=shared)


@contextlib.contextmanager
def written_aside(path: str) -> Iterator[Path]:
    """Provide a local file to write, and move or upload it to `path` when the block succeeds."""
    if is_url(path):
        with tempfile.TemporaryDirectory() as folder:
            part = Path(folder) / "part"
            yield part
            with _accessing(path) as (filesystem, name):
                filesystem.put_file(str(part), name)
        return
    part = Path(path).with_name(f".{Path(path).name}.part")
    try:
        yield part
        with _accessing(path):
            part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def remove(path: str) -> None:
    """Remove a file or an empty folder, if it exists."""
    with contextlib.suppress(NotFound), _accessing(path) as (filesystem, name):
        if filesystem:
            filesystem.rm_file(name)  # `rm` would expand patterns
        elif Path(path).is_dir():
            Path(path).rmdir()
        else:
            Path(path).unlink()


def fingerprint(path: str) -> dict[str, object] | None:
    """Return the size of a file and its time of change or ETag; None if it does not exist.

    The fingerprint changes when the content of the file changes.
    """
    try:
        with _accessing(path) as (filesystem, name):
            if not filesystem:
                status = os.stat(name)
                return {"size": status.st_size, "modified": status.st_mtime}
            facts = filesystem.info(name)
    except NotFound:
        return None
    changed = {key: str(facts[key]) for key in ("ETag", "etag", "mtime", "created") if key in facts}
    return {"size": facts["size"], **dict(list(changed.items())[:1])}


def exists(path: str) -> bool:
    """Return True if there is a file or a folder of exactly this name."""
    with _accessing(path) as (filesystem, name):
        return bool(filesystem.exists(name)) if filesystem else os.path.exists(name)


def is_folder(path: str) -> bool:
    """Return True if there is a folder of this name."""
    with _accessing(path) as (filesystem, name):
        return bool(filesystem.isdir(name)) if filesystem else os.path.isdir(name)


def listing(folder: str) -> tuple[list[str], list[str]]:
    """Return the sorted paths of the files and of the folders in a folder, without hidden ones.

    Hidden names begin with a dot. macOS leaves `._name` beside each file that it copies to a disk
    of another format.
    """
    files: list[str] = []
    folders: list[str] = []
    with _accessing(folder) as (filesystem, name):
        if filesystem:
            for entry in filesystem.ls(name, detail=True):
                path = filesystem.unstrip_protocol(entry["name"].rstrip("/"))
                if entry["name"].rstrip("/") != name.rstrip("/"):
                    (folders if entry["type"] == "directory" else files).append(path)
        else:
            with os.scandir(name) as entries:
                for entry in entries:
                    (folders if entry.is_dir() else files).append(entry.path)
    return (
        sorted(path for path in files if not _hidden(path)),
        sorted(path for path in folders if not _hidden(path)),
    )


def _hidden(path: str) -> bool:
    return path.rpartition("/")[2].startswith(".")


def is_pattern(path: str) -> bool:
    """Return True if the path contains `*`, `?`, `[…]`, or a frame number such as `%05d`."""
    return re.search(r"[*?\[]|%0?\d*d", path) is not None


def matching(pattern: str) -> list[str]:
    """Return the sorted paths that match a pattern with `*`, `?`, `[…]`, `**` or `%05d`.

    The longest leading part that exists is taken literally, so that folders and files may have
    these characters in their names. `%05d` is a number of at least five digits.
    """
    with _accessing(pattern) as (filesystem, name):
        if filesystem:
            literal = _literal_part(name, filesystem.exists)
            found = filesystem.glob(glob.escape(literal) + _as_glob(name[len(literal) :]))
            paths = [filesystem.unstrip_protocol(path) for path in found]
            pattern = filesystem.unstrip_protocol(name)
        else:
            pattern = os.path.expanduser(name)
            literal = _literal_part(pattern, os.path.exists)
            paths = glob.glob(
                glob.escape(literal) + _as_glob(pattern[len(literal) :]), recursive=True
            )
    numbered = _numbers(pattern)
    return sorted(path for path in paths if numbered is None or numbered.fullmatch(path))


def _literal_part(path: str, exists: Any) -> str:
    """Return the leading folders of a path, with the last slash, that exist by that name."""
    ends = [match.end() for match in re.finditer("/+", path)]
    # The storage is queried only for names that look like patterns.
    for end in ends:
        if is_pattern(path[:end]) and not exists(path[:end].rstrip("/") or "/"):
            return path[: max((before for before in ends if before < end), default=0)]
    return path[: ends[-1]] if ends else ""


_NUMBER = re.compile(r"%(?:0?(\d+))?d")


def _as_glob(pattern: str) -> str:
    if not _NUMBER.search(pattern):
        return pattern
    return _NUMBER.sub("*", pattern.replace("[", "[[]"))


def _numbers(pattern: str) -> re.Pattern[str] | None:
    """Return the paths that a pattern with `%05d` matches; None for a pattern without numbers."""
    if not _NUMBER.search(pattern):
        return None
    text, place = "", 0
    for number in _NUMBER.finditer(pattern):
        text += _glob_to_regex(pattern[place : number.start()]) + rf"\d{{{number[1] or 1},}}"
        place = number.end()
    return re.compile(text + _glob_to_regex(pattern[place:]))


def _glob_to_regex(pattern: str) -> str:
    """Translate `*` and `?`; brackets are literal in patterns with numbers."""
    return "".join({"*": ".*", "?": "."}.get(letter, re.escape(letter)) for letter in pattern)


@contextlib.contextmanager
def _accessing(path: str) -> Iterator[tuple[Any, str]]:
    """Provide the fsspec file system of a URL, or None, and the path in it.

    Raises:
        StorageError: the block raised an OSError, or an error of the storage's library.
    """
    try:
        if not is_url(path):
            yield None, path
            return
        with requires_extra("cli"):
            import fsspec  # noqa: PLC0415  slow to import, and only needed here
        try:
            yield fsspec.core.url_to_fs(path)
        except (Error, OSError):
            raise
        except Exception as error:  # of botocore, aiohttp, …, or a package that is not installed
            raise StorageError(f"{path}: {error}") from error
    except FileNotFoundError as error:
        raise NotFound(f"{path} does not exist") from error
    except Error:
        raise
    except OSError as error:
        raise StorageError(f"{error.filename or path}: {error.strerror or error}") from error

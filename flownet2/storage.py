"""Files in a folder of this machine or, by a URL that fsspec knows (s3://…, gs://…), elsewhere.

Paths are strings; one without a scheme is a plain path and needs no fsspec.
"""

import contextlib
import glob
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from flownet2.errors import requires_extra
from flownet2.files import write_atomically


def is_url(path: str) -> bool:
    """Whether the path has a scheme, such as s3://."""
    return "://" in path


def join(folder: str, name: str) -> str:
    """The path of a file below a folder."""
    return f"{folder.rstrip('/')}/{name}" if is_url(folder) else os.path.join(folder, name)


def read(path: str) -> bytes:
    """A file's content; OSError where it cannot be read."""
    if not is_url(path):
        return Path(path).read_bytes()
    with _remote(path) as (filesystem, name):
        content: bytes = filesystem.cat_file(name)
        return content


def open_file(path: str) -> IO[bytes]:
    """A file to read and seek in; OSError where there is none."""
    if not is_url(path):
        return Path(path).open("rb")
    with _remote(path) as (filesystem, name):
        file: IO[bytes] = filesystem.open(name, "rb")
        return file


def write(path: str, content: bytes, shared: bool = False) -> None:
    """Put a file there, whole or not at all, with the folders that it needs.

    `shared`: other processes, of other machines too, may write the same file at once. Any other
    file is written aside under one name, so that what a killed writer leaves is written over.
    """
    if is_url(path):
        with _remote(path) as (filesystem, name):
            filesystem.makedirs(filesystem._parent(name), exist_ok=True)
            filesystem.pipe_file(name, content)
        return
    write_atomically(path, content, shared=shared)


@contextlib.contextmanager
def written_aside(path: str) -> Iterator[Path]:
    """A file of this machine to write, which then takes its place whole."""
    if is_url(path):
        with tempfile.TemporaryDirectory() as folder:
            part = Path(folder) / "part"
            yield part
            with _remote(path) as (filesystem, name):
                filesystem.put_file(str(part), name)
        return
    part = _part_of(path)
    try:
        yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _part_of(path: str) -> Path:
    return Path(path).with_name(f".{Path(path).name}.part")


def remove(path: str) -> None:
    """Remove a file, or a folder that is empty; nothing happens where there is none."""
    try:
        if is_url(path):
            with _remote(path) as (filesystem, name):
                filesystem.rm(name)
        elif Path(path).is_dir():
            Path(path).rmdir()
        else:
            Path(path).unlink()
    except FileNotFoundError:
        pass


def identity(path: str) -> dict[str, object] | None:
    """What tells that a file is still the same: size, and time of change or ETag; None: no file."""
    try:
        if not is_url(path):
            status = os.stat(path)
            return {"size": status.st_size, "modified": status.st_mtime}
        with _remote(path) as (filesystem, name):
            facts = filesystem.info(name)
    except FileNotFoundError:
        return None
    changed = {key: str(facts[key]) for key in ("ETag", "etag", "mtime", "created") if key in facts}
    return {"size": facts["size"], **dict(list(changed.items())[:1])}


def is_folder(path: str) -> bool:
    """Whether there is a folder."""
    if not is_url(path):
        return Path(path).is_dir()
    with _remote(path) as (filesystem, name):
        return bool(filesystem.isdir(name))


def files(folder: str) -> list[str]:
    """Paths of the files in a folder, without those of its folders."""
    if not is_url(folder):
        return [entry.path for entry in os.scandir(folder) if entry.is_file()]
    with _remote(folder) as (filesystem, name):
        return [
            filesystem.unstrip_protocol(entry["name"])
            for entry in filesystem.ls(name, detail=True)
            if entry["type"] == "file"
        ]


def matching(pattern: str) -> list[str]:
    """Paths that a pattern with `*`, `?`, `[…]` or `**` matches."""
    if not is_url(pattern):
        return glob.glob(os.path.expanduser(pattern), recursive=True)
    with _remote(pattern) as (filesystem, name):
        return [filesystem.unstrip_protocol(found) for found in filesystem.glob(name)]


@contextlib.contextmanager
def _remote(url: str) -> Iterator[tuple[Any, str]]:
    """The file system of a URL and the path there; what its library raises becomes OSError."""
    with requires_extra("cli"):
        import fsspec  # noqa: PLC0415  slow to import, and only needed here

    try:
        yield fsspec.core.url_to_fs(url)
    except OSError:
        raise
    except Exception as error:  # of botocore, aiohttp, …, or a package that is not installed
        raise OSError(f"{url}: {error}") from error

"""Files that lie in a folder of this machine or, by a URL that fsspec knows, elsewhere.

A path without a scheme is a plain path and needs no fsspec.
"""

from pathlib import Path
from typing import Any


def is_url(path: str) -> bool:
    """Whether the path has a scheme, such as s3://."""
    return "://" in path


def _filesystem(url: str) -> tuple[Any, str]:
    import fsspec  # noqa: PLC0415  slow to import, and only needed here

    filesystem, name = fsspec.core.url_to_fs(url)
    return filesystem, name


def read(path: str) -> bytes:
    """A file's content; OSError where it cannot be read."""
    if not is_url(path):
        return Path(path).read_bytes()
    filesystem, name = _filesystem(path)
    content: bytes = filesystem.cat_file(name)
    return content

"""Atomic writing of local files."""

import os
import uuid
from pathlib import Path


def write_atomically(path: str | os.PathLike[str], content: bytes, *, shared: bool = False) -> None:
    """Write a file atomically: readers see its old content or all of its new content.

    The content goes to a hidden file beside it, `.<name>.part`, which is then renamed. Missing
    folders are created.

    Args:
        path: the file to write or to replace.
        content: its new content.
        shared: whether several processes, also on other machines, may write the file at once. Each
            then uses its own hidden file; otherwise the next writer reuses the file that a killed
            writer left behind.

    Raises:
        OSError: the file cannot be written; `filename` is `path`.
    """
    path = Path(path)
    part = path.with_name(f".{path.name}{uuid.uuid4().hex if shared else ''}.part")
    try:
        try:
            part.write_bytes(content)
        except FileNotFoundError:
            part.parent.mkdir(parents=True, exist_ok=True)
            part.write_bytes(content)
        part.replace(path)
    except OSError as error:  # a full disk raises it without a name
        part.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from error

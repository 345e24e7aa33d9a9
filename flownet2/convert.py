"""Conversion of many flow files: to another format, to pictures or to a video of one scale."""

import glob
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from flownet2.colours import colours
from flownet2.errors import Error
from flownet2.files import write_atomically
from flownet2.formats import (
    READABLE,
    Flow,
    Format,
    FormatError,
    read_flow,
    to_picture,
)
from flownet2.images import Pixels
from flownet2.sources import natural

VIDEO = ".mp4"
FRAMES_PER_SECOND = 25


class ConvertError(Error):
    """Raised for sources without flow, or when two results would have the same name."""


@dataclass(frozen=True)
class FlowFile:
    """A flow file, and its name: the path below the source folder, without the suffix."""

    path: Path
    name: str

    def read(self) -> Flow:
        """Read the flow; raise FormatError if it is damaged."""
        return read_flow(self.path)


def find_flows(sources: Iterable[str]) -> list[FlowFile]:
    """List the flow files of paths, folders and patterns.

    Folders are searched recursively; hidden files, and PNG files other than KITTI's, are skipped. A
    flow from a folder is named by its path below that folder. Files given directly are named by
    their paths below their common folder.

    Raises:
        ConvertError: a source has no flow file.
    """
    found: list[tuple[Path, Path | None]] = []  # with the source folder
    for source in sources:
        path = Path(source)
        if path.is_dir():
            folder, files = path, [file for file in path.rglob("*") if _is_flow(file, path)]
        elif path.exists() or not glob.has_magic(source):
            folder, files = None, [path]
        else:
            matching = map(Path, glob.glob(source, recursive=True))
            folder, files = None, [file for file in matching if file.is_file()]
        if not files:
            raise ConvertError(f"{source} has no flow files: {', '.join(READABLE)}")
        found += [(file, folder) for file in sorted(files, key=lambda file: natural(str(file)))]
    parents = [str(file.parent) for file, folder in found if folder is None]
    common = os.path.commonpath(map(os.path.abspath, parents)) if parents else ""
    return [
        FlowFile(
            file,
            os.path.splitext(os.path.relpath(file, common if folder is None else folder))[0],
        )
        for file, folder in found
    ]


def _is_flow(path: Path, folder: Path) -> bool:
    """Return True for a file in a folder that has the suffix of a flow and is not hidden."""
    if "/." in f"/{path.relative_to(folder).as_posix()}" or not path.is_file():
        return False
    if path.suffix.lower() != ".png":
        return path.suffix.lower() in READABLE
    with path.open("rb") as file:
        return file.read(26)[24:26] == b"\x10\x02"  # 16 bits, RGB


def longest(files: Iterable[FlowFile]) -> float:
    """Return the length of the longest vector of all files, in pixels."""
    maximum = 0.0
    for file in files:
        flow = file.read()
        lengths = np.hypot(flow[..., 0], flow[..., 1])
        maximum = max(maximum, float(np.max(lengths, where=np.isfinite(lengths), initial=0)))
    return maximum


def write_file(source: Path, target: Path, format: Format, max_flow: float | None = None) -> None:
    """Write a flow file in another format.

    Args:
        source: the flow file.
        target: the file to write.
        format: its format.
        max_flow: motion drawn in the strongest colours of a picture, in pixels; by default the
            longest.

    Raises:
        FormatError: the source is damaged, or the format cannot hold its flow.
    """
    flow = read_flow(source)
    try:
        content = format.encode(flow) if format.decode else to_picture(flow, max_flow)
    except FormatError as error:
        raise FormatError(f"{source} cannot be written as {target}: {error}") from error
    write_atomically(target, content)


def write_files(
    files: list[FlowFile],
    folder: Path,
    format: Format,
    max_flow: float | None,
    advance: Callable[[], None],
) -> None:
    """Write each flow below a folder in another format.

    Args:
        files: the flows.
        folder: the folder of the results, which keep the names of the flows.
        format: their format.
        max_flow: motion of the strongest colours of pictures, in pixels; by default the longest of
            all flows.
        advance: called after each file.

    Raises:
        ConvertError: two results would have the same name.
        FormatError: a file is damaged, or the format cannot hold its flow.
    """
    names: dict[str, Path] = {}
    for file in files:
        name = f"{file.name}{format.suffix}"
        if name in names:
            raise ConvertError(f"{names[name]} and {file.path} would both be written to {name}")
        names[name] = file.path
    if format.decode is None and max_flow is None:
        max_flow = longest(files)
    for name, path in names.items():
        write_file(path, folder / name, format, max_flow)
        advance()


def write_video(
    files: list[FlowFile], path: Path, max_flow: float | None, advance: Callable[[], None]
) -> None:
    """Write a video of all flows in colours, 25 per second, in their order.

    Args:
        files: the flows.
        path: the video, .mp4.
        max_flow: motion of the strongest colours, in pixels; by default the longest of all flows.
        advance: called after each flow.

    Raises:
        ConvertError: the flows differ in size.
        FormatError: a file is damaged.
    """
    from flownet2 import video  # noqa: PLC0415  slow to import

    scale = max_flow or longest(files)

    def pictures() -> Iterator[tuple[float, Pixels]]:
        size = None
        for number, file in enumerate(files):
            flow = file.read()
            if size not in (None, flow.shape):
                raise ConvertError(f"{file.path} differs in size from the flows before it")
            size = flow.shape
            yield number / FRAMES_PER_SECOND, colours(flow, scale)
            advance()

    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    try:
        video.write(part, pictures())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)

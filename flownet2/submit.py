"""Archives for the test servers of KITTI, MPI-Sintel and Spring.

    test split -> pairs -> server's flow -> ARCHIVE.files/ -> archive, checked

The folder `ARCHIVE.files` keeps the finished flows of a run that was interrupted.
"""

import asyncio
import json
import shutil
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from flownet2.client import AsyncClient
from flownet2.concurrency import in_order
from flownet2.datasets import SPRING_VIEWS, DatasetError, filled, matches
from flownet2.errors import Error
from flownet2.files import write_atomically
from flownet2.formats import (
    FORMATS,
    KITTI_SCALE,
    KITTI_ZERO,
    READABLE,
    Flow,
    FormatError,
    known,
)
from flownet2.images import Frame
from flownet2.models import Model

KITTI_LIMITS = (-KITTI_ZERO / KITTI_SCALE, (2**16 - 1 - KITTI_ZERO) / KITTI_SCALE)
"""Smallest and largest component that KITTI's PNG can hold, in pixels."""


class SubmitError(Error):
    """Raised for an archive that would be wrong; the message says at which file."""


@dataclass(frozen=True)
class Part:
    """A part of a submission, as paths below the dataset's folder and in the archive.

    The fields in braces are those of `flownet2.datasets`.
    """

    first: str
    second: str
    output: str


@dataclass(frozen=True)
class Submission:
    """A benchmark's submission: its parts, and the number of pairs in its test split."""

    title: str
    parts: tuple[Part, ...]
    pairs: int


def _kitti(year: int, frames: str, output: str, pairs: int) -> Submission:
    frame = f"testing/{frames}/{{sequence}}"
    part = Part(f"{frame}_10.png", f"{frame}_11.png", f"{output}{{sequence}}_10.png")
    return Submission(f"KITTI {year}", (part,), pairs)


def _sintel(kind: str) -> Part:
    frame = f"test/{kind}/{{sequence}}/frame_"
    return Part(
        frame + "{number}.png",
        frame + "{next}.png",
        f"{kind}/{{sequence}}/frame_{{number}}.flo",
    )


def _spring(side: str, direction: str) -> Part:
    frame = f"test/{{sequence}}/frame_{side}/frame_{side}_"
    flow = f"flow_{direction}_{side}"
    return Part(
        frame + "{number}.png",
        frame + ("{next}.png" if direction == "FW" else "{previous}.png"),
        f"{{sequence}}/{flow}/{flow}_{{number}}.flo5",
    )


SUBMISSIONS: dict[str, tuple[Submission, ...]] = {
    "kitti": (
        _kitti(2015, "image_2", "flow/", 200),
        _kitti(2012, "colored_0", "", 195),
        _kitti(2012, "image_0", "", 195),
    ),
    "sintel": (Submission("MPI-Sintel", (_sintel("clean"), _sintel("final")), 2 * 552),),
    "spring": (Submission("Spring", tuple(_spring(*view) for view in SPRING_VIEWS), 4 * 990),),
}
"""Submissions by dataset; the first whose frames are in the folder is used."""


@dataclass(frozen=True)
class Pair:
    """Two frames, and the name of their flow in the archive."""

    first: Path
    second: Path
    output: str


def find_pairs(dataset: str, folder: Path) -> tuple[Submission, list[Pair]]:
    """List the pairs of a test split.

    Raises:
        DatasetError: the folder has no test split, or a frame is missing.
    """
    if not folder.is_dir():
        raise DatasetError(f"{folder} is not a folder")
    folder = folder.resolve()
    if folder.name in ("test", "testing"):
        folder = folder.parent
    for submission in SUBMISSIONS[dataset]:
        pairs = [list(_pairs(part, folder)) for part in submission.parts]
        if any(pairs):
            for part, found in zip(submission.parts, pairs, strict=True):
                if not found:
                    raise DatasetError(f"{folder} has no frames {part.first}")
            return submission, [pair for of_part in pairs for pair in of_part]
    first = SUBMISSIONS[dataset][0].parts[0].first
    raise DatasetError(f"{folder} has no test split of {dataset}: there are no frames {first}")


def _pairs(part: Part, folder: Path) -> Iterator[Pair]:
    frames = list(matches(folder, part.first))
    ends: dict[str, list[int]] = {}
    for fields in frames:
        ends.setdefault(fields["sequence"], []).append(int(fields.get("number", 0)))
    for fields in frames:
        second = filled(folder, part.second, fields)
        if not second.exists():
            numbers = ends[fields["sequence"]]
            last = min(numbers) if "{previous}" in part.second else max(numbers)
            if "number" in fields and int(fields["number"]) == last:
                continue  # the sequence ends here
            raise DatasetError(f"{second} is missing")
        yield Pair(filled(folder, part.first, fields), second, part.output.format_map(fields))


async def compute(
    pairs: list[Pair],
    archive: Path,
    client: AsyncClient,
    jobs: int,
    advance: Callable[[], None],
    say: Callable[[str], None],
) -> None:
    """Compute the flow of all pairs, and write and check the archive.

    A call after an interrupted one computes what is missing.

    Args:
        pairs: the pairs of `find_pairs`.
        archive: the zip file to write.
        client: the client of the server.
        jobs: number of concurrent requests.
        advance: called after each pair.
        say: called with warnings.

    Raises:
        SubmitError: results of another run are in the way, or the archive would be wrong.
        Error: a pair cannot be read, or the server returns no flow for it.
        OSError: a file cannot be read or written.
    """
    folder = archive.with_name(f"{archive.name}.files")
    _resume(folder, pairs, await client.model())

    async def request(pair: Pair) -> Flow | None:
        if await asyncio.to_thread(_fault, folder / pair.output, pair) is None:
            return None
        return (await client.flow(pair.first, pair.second)).flow

    def write(pair: Pair, flow: Flow | None) -> None:
        if flow is None:
            return
        if not known(flow).all():
            raise SubmitError(f"the flow of {pair.first} has values that are not finite")
        path = folder / pair.output
        if path.suffix == ".png":
            within = np.clip(flow, *KITTI_LIMITS)
            clipped = (within != flow).any(axis=2)
            if clipped.any():
                say(
                    f"{pair.output}: {clipped.mean():.2%} of the vectors are clipped to the 512 "
                    "pixels that KITTI's PNG holds"
                )
            flow = within
        format = next(
            format for format in FORMATS.values() if format.suffix == path.suffix and format.decode
        )
        write_atomically(path, format.encode(flow))

    await in_order(pairs, request, write, jobs, advance)
    _pack(folder, pairs, archive)
    shutil.rmtree(folder)


def _resume(folder: Path, pairs: list[Pair], model: Model) -> None:
    """Record the frames and model of a folder of finished flows, or check that they match."""
    path = folder / "submission.json"
    facts = json.loads(json.dumps([asdict(model), [str(pair.first) for pair in pairs]]))
    try:
        before = json.loads(path.read_bytes())
    except FileNotFoundError:
        write_atomically(path, json.dumps(facts).encode())
        return
    except ValueError:
        before = None
    if before != facts:
        raise SubmitError(
            f"{folder} holds flow of another run (other frames or another model): remove the folder"
        )


def _fault(path: Path, pair: Pair, content: bytes | None = None) -> str | None:
    """Return what is wrong with a flow file; None if it is complete and of the frames' size."""
    try:
        flow = READABLE[path.suffix](path.read_bytes() if content is None else content)
    except FileNotFoundError:
        return "is missing"
    except FormatError as error:
        return f"is damaged: {error}"
    height, width, _ = flow.shape
    if (width, height) != Frame(pair.first).size():
        return f"is {width}x{height}, which is not the frames' size"
    return None if known(flow).all() else "has values that are not finite"


def _pack(folder: Path, pairs: list[Pair], archive: Path) -> None:
    """Write the archive beside its place, check it, and move it there."""
    part = archive.with_name(f".{archive.name}.part")
    try:
        with zipfile.ZipFile(part, "w", compresslevel=1) as file:
            for pair in pairs:  # .flo files are the only ones that are not compressed already
                compressed = not pair.output.endswith(".flo")
                method = zipfile.ZIP_STORED if compressed else zipfile.ZIP_DEFLATED
                file.write(folder / pair.output, pair.output, method)
        with zipfile.ZipFile(part) as file:
            if sorted(file.namelist()) != sorted(pair.output for pair in pairs):
                raise SubmitError(f"{archive}: the names in the archive are not those expected")
            for pair in pairs:
                fault = _fault(Path(pair.output), pair, file.read(pair.output))
                if fault:
                    raise SubmitError(f"{archive}: {pair.output} {fault}")
        part.replace(archive)
    finally:
        part.unlink(missing_ok=True)

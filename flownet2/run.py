"""Computing the flow of whole sources with bounded memory.

    sources -> pairs -> client (several requests at a time) -> encoded files -> index

Reading, inference, encoding and writing overlap; results are written in the order of the pairs.
"""

import asyncio
import csv
import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Literal, Protocol

from flownet2 import storage, video, writers
from flownet2.client import AsyncClient
from flownet2.errors import Error, FlowError
from flownet2.formats import FormatError
from flownet2.manifest import Index, Row, checksum, remove_manifest, update_manifest
from flownet2.models import Model
from flownet2.pairs import Pair, PairList, Selection, Source, Video
from flownet2.sources import shard
from flownet2.writers import PICTURES, STRETCH, VIDEO, Options

PATIENCE_SECONDS = 300.0
"""Time for which a run waits for servers that do not answer."""


class RunError(Error):
    """Raised when a run stops early; the message names the source and the remedy."""


class Progress(Protocol):
    """Receives the progress of a run."""

    shown: bool
    """True if the number of pairs is shown, and therefore worth computing."""

    def begin(self, name: str) -> None:
        """Show the name of the source whose results are being written."""

    def expect(self, pairs: int) -> None:
        """Set the expected number of pairs of all sources."""

    def advance(self) -> None:
        """Count a pair that is written or already existed."""

    def warn(self, message: str) -> None:
        """Print a line."""


@dataclass(frozen=True)
class Plan:
    """Settings of a run: frames, files, parallelism, and what to do about errors and old files."""

    selection: Selection = field(default_factory=Selection)
    options: Options = field(default_factory=Options)
    jobs: int = 8
    on_error: Literal["stop", "skip"] = "stop"
    overwrite: bool = False
    shard: tuple[int, int] = (0, 1)


@dataclass
class Totals:
    """Counts of a run.

    Attributes:
        sources: number of sources of this shard.
        computed: number of pairs computed.
        found: number of pairs whose files existed already.
        skipped: source, frames and reason of each error that was skipped.
    """

    sources: int = 0
    computed: int = 0
    found: int = 0
    skipped: list[tuple[str, str, str]] = field(default_factory=list)


async def run(
    sources: Mapping[str, Source], folder: str, client: AsyncClient, plan: Plan, progress: Progress
) -> Totals:
    """Write the flow of sources below a folder.

    Raises:
        RunError: a source cannot be read or a pair fails, unless errors are skipped. What was
            computed before is written.
        ManifestError: the folder holds results of another run.
        FlowError: no server answers.
        StorageError: the results cannot be written.
    """
    model = await client.model()
    runner = _Runner(shard(sources, *plan.shard), folder, client, plan, progress)
    await asyncio.to_thread(runner.prepare, sources, model)
    await runner.run()
    return runner.totals


class _Scale:
    """The colour scale of a source's video, known after its first pairs."""

    def __init__(self, known: float | None) -> None:
        self.value: asyncio.Future[float] = asyncio.get_running_loop().create_future()
        self._lengths: list[float] = []
        self._expected = STRETCH
        self.saved = known is not None
        """True if a resumed run will find the scale."""
        if known is not None:
            self.value.set_result(known)

    def add(self, length: float) -> None:
        """Add the longest motion of one of the first pairs."""
        self._lengths.append(length)
        self.expect(self._expected)

    def expect(self, pairs: int) -> None:
        """Set the scale after at most this number of pairs."""
        self._expected = min(pairs, self._expected)
        if len(self._lengths) >= self._expected and not self.value.done():
            self.value.set_result(max(self._lengths, default=1.0))


@dataclass(eq=False)
class _Target:
    """The folder of a source while it is written."""

    name: str
    folder: str
    index: Index
    video: bool
    scale: _Scale
    missing: int = 0
    """Pairs whose files did not exist when the run began."""


@dataclass(frozen=True)
class _Step:
    """An event while a source is read: a pair, an error, or (neither) the end of the source.

    Attributes:
        target: the source's folder.
        pair: the pair.
        position: number of the pair among those that are missing; None if its files exist.
        error: the reason why the source cannot be read further.
    """

    target: _Target
    pair: Pair | None = None
    position: int | None = None
    error: str = ""


_Work = asyncio.Task[dict[str, bytes]] | None


class _Runner:
    def __init__(
        self,
        sources: Mapping[str, Source],
        folder: str,
        client: AsyncClient,
        plan: Plan,
        progress: Progress,
    ) -> None:
        self.sources = sources
        self.folder = folder
        self.client = client
        self.plan = plan
        self.options = plan.options
        self.progress = progress
        self.totals = Totals(len(sources))
        self.requests = asyncio.Semaphore(plan.jobs)
        self.window = asyncio.Semaphore(max(2 * plan.jobs, STRETCH))
        """Bounds the pairs between reading and writing."""
        self.finished: set[str] = set()
        self.shown: _Target | None = None
        self.open: set[_Target] = set()
        self.work: set[asyncio.Task[dict[str, bytes]]] = set()

    def prepare(self, sources: Mapping[str, Source], model: Model) -> None:
        """Check sources, names and the content of the folder."""
        fingerprints = {}
        for name, source in sources.items():
            if (
                name not in self.sources
                and isinstance(source, Video)
                and video.is_live(source.path)
            ):
                continue
            try:
                fingerprints[name] = {"path": source.path, **source.fingerprint()}
            except (Error, OSError) as error:
                if self.plan.on_error == "stop":
                    raise RunError(str(error)) from error
        for source in self.sources.values():
            self._check_names(source)
        if self.plan.overwrite:
            remove_manifest(self.folder)
            for name in self.sources:
                Index(storage.join(self.folder, name)).clear()
        facts = {
            "options": {**asdict(self.plan.selection), **asdict(self.options)},
            "model": {
                "name": model.name,
                "network": model.network,
                "model_sha256": model.model_sha256,
            },
        }
        update_manifest(self.folder, facts, fingerprints)

    def _check_names(self, source: Source) -> None:
        """Raise RunError if two pairs would write one file."""
        if self.options.numbered and not isinstance(source, PairList):
            return
        if isinstance(source, Video):
            raise RunError(
                f"{source.path}: the names {self.options.pattern!r} are the same for all pairs of "
                "a video: add {number:06}"
            )
        writers_of: dict[str, Pair] = {}
        try:
            for pair in source.pairs(self.plan.selection, lambda _: None):
                for name in self.options.names(pair):
                    other = writers_of.setdefault(name, pair)
                    if other is not pair:
                        both = (
                            f"lines {other.line} and {pair.line}"
                            if pair.line
                            else f"{other.first.name} and {pair.first.name}"
                        )
                        raise RunError(f"{source.path}: {both} both write {name}")
        except (Error, OSError) as error:
            if isinstance(error, RunError) or self.plan.on_error == "stop":
                raise RunError(str(error)) from error

    async def run(self) -> None:
        """Read and write all sources."""
        steps: asyncio.Queue[tuple[_Step, _Work] | None] = asyncio.Queue()
        tasks = [asyncio.create_task(self._read(steps))]
        if self.progress.shown:
            tasks.append(asyncio.create_task(self._count()))
        try:
            while (item := await steps.get()) is not None:
                await self._finish(*item)
                self.window.release()
            await tasks[0]
        finally:
            for task in (*tasks, *self.work):
                task.cancel()
            await asyncio.gather(*tasks, *self.work, return_exceptions=True)
            for target in self.open:
                await asyncio.to_thread(target.index.flush)

    async def _count(self) -> None:
        """Report the number of pairs of all sources, if every header gives it."""

        def count() -> int | None:
            pairs = 0
            for source in self.sources.values():
                try:
                    counted = source.count(self.plan.selection)
                except (Error, OSError):
                    counted = 0
                if counted is None:
                    return None
                pairs += counted
            return pairs

        pairs = await asyncio.to_thread(count)
        if pairs is not None:
            self.progress.expect(pairs)

    async def _read(self, steps: asyncio.Queue[tuple[_Step, _Work] | None]) -> None:
        """Read all sources and start the work on their pairs; None ends the queue."""
        try:
            for name, source in self.sources.items():
                target = await self._begin(name)
                events = self._events(target, source)
                while step := await asyncio.to_thread(next, events, None):
                    await self.window.acquire()
                    task = None
                    if step.pair and step.position is not None:
                        task = asyncio.create_task(self._compute(target, step.pair, step.position))
                        self.work.add(task)
                        task.add_done_callback(self._ended)
                    steps.put_nowait((step, task))
                target.scale.expect(target.missing)
        finally:
            steps.put_nowait(None)

    def _ended(self, task: asyncio.Task[dict[str, bytes]]) -> None:
        self.work.discard(task)
        if not task.cancelled():
            task.exception()  # marks it as seen: a run that stops early does not await all tasks

    async def _begin(self, name: str) -> _Target:
        folder = storage.join(self.folder, name)
        index = await asyncio.to_thread(Index, folder)
        coloured = "mp4" in self.options.formats and not await asyncio.to_thread(index.has, VIDEO)
        scale = self.options.max_flow
        if coloured and scale is None and index.has(_SCALE):
            scale = _read_scale(storage.join(folder, _SCALE))
        target = _Target(name, folder, index, coloured, _Scale(scale))
        self.open.add(target)
        return target

    def _events(self, target: _Target, source: Source) -> Iterator[_Step]:
        """Yield the pairs of a source, the error that ends it if there is one, and its end."""
        try:
            for pair in source.pairs(self.plan.selection, self.progress.warn):
                names = self.options.names(pair)
                if target.video:
                    names.append(_picture(pair))
                done = all(target.index.has(name) for name in names)
                yield _Step(target, pair, None if done else target.missing)
                target.missing += not done
        except (Error, OSError) as error:
            yield _Step(target, error=str(error))
        yield _Step(target)

    async def _compute(self, target: _Target, pair: Pair, position: int) -> dict[str, bytes]:
        """Return the files of a pair."""
        length = 1.0
        measured = target.video and position < STRETCH
        try:
            async with self.requests:
                result = await self.client.flow(
                    pair.first.frame, pair.second.frame, direction=self.options.requested
                )
            if measured:
                length = await asyncio.to_thread(writers.motion, result.flow)
        finally:
            if measured:
                target.scale.add(length)
        scale = await target.scale.value if target.video else 0.0

        def encode() -> dict[str, bytes]:
            files = dict(self.options.files(pair, result))
            if target.video:
                beside = pair.first.frame.pixels() if self.options.side_by_side else None
                files[_picture(pair)] = writers.video_picture(result.flow, scale, beside)
            return files

        return await asyncio.to_thread(encode)

    async def _finish(self, step: _Step, work: _Work) -> None:
        """Write the result of a step."""
        if step.target is not self.shown:
            self.shown = step.target
            self.progress.begin(step.target.name)
        if step.pair is None:
            if step.error:
                await self._report(step.target, "", step.error)
            else:
                await asyncio.to_thread(self._end, step.target)
                self.finished.add(step.target.name)
            return
        if work is None:
            self.totals.found += 1
        else:
            try:
                files = await work
            except (FlowError, FormatError) as error:
                if isinstance(error, FlowError) and error.unavailable:
                    raise
                names = f"{step.pair.first.name} and {step.pair.second.name}"
                await self._report(step.target, names, str(error))
                return
            await asyncio.to_thread(self._write, step.target, step.pair, files)
            self.totals.computed += 1
        self.progress.advance()

    def _write(self, target: _Target, pair: Pair, files: Mapping[str, bytes]) -> None:
        first, second = pair.first, pair.second
        if target.video and not target.scale.saved:
            target.index.write(_SCALE, json.dumps(target.scale.value.result()).encode())
            target.scale.saved = True
        for name, content in files.items():
            target.index.write(
                name, content, pair.number, (first.name, second.name), (first.time, second.time)
            )

    def _end(self, target: _Target) -> None:
        """Write the video of a source and sort its index."""
        rows = target.index.rows()
        temporary = [row for row in rows if row.file.startswith(f"{PICTURES}/")]
        pictures = [row for row in temporary if row.number is not None]
        if target.video and pictures:
            path = storage.join(target.folder, VIDEO)
            files = ((row.time, storage.join(target.folder, row.file)) for row in pictures)
            with storage.written_aside(path) as part:
                writers.write_video(part, files)
                target.index.note(Row(None, "", "", None, None, VIDEO, *checksum(part)))
        for row in temporary:  # also files of a run that was killed at this point
            target.index.drop(row.file)
        if temporary:
            storage.remove(storage.join(target.folder, PICTURES))
        if rows:
            target.index.rewrite()
        self.open.discard(target)

    async def _report(self, target: _Target, names: str, reason: str) -> None:
        """Record an error in errors.csv, or stop the run with RunError."""
        if self.plan.on_error == "stop":
            where = f"{target.name}, {names}: " if names else ""
            if not names:
                await asyncio.to_thread(self._end, target)  # keep what could be read
                self.finished.add(target.name)
            left = len(self.sources.keys() - self.finished) - bool(names)
            rest = (
                f"; {left} other source{'s are' if left > 1 else ' is'} not done, and --on-error "
                "skip would go on with them"
            )
            raise RunError(f"{where}{reason}{rest if left else ''}")
        self.totals.skipped.append((target.name, names, reason))
        self.progress.warn(f"skipped {target.name}{f', {names}' if names else ''}: {reason}")
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(
            [("source", "frames", "reason"), *self.totals.skipped]
        )
        index, count = self.plan.shard
        name = "errors.csv" if count == 1 else f"errors-{index}-of-{count}.csv"
        content = text.getvalue().encode(errors="surrogateescape")
        await asyncio.to_thread(storage.write, storage.join(self.folder, name), content)


_SCALE = f"{PICTURES}/scale.json"


def _read_scale(path: str) -> float | None:
    try:
        return float(json.loads(storage.read(path)))
    except (storage.StorageError, ValueError, TypeError):
        return None


def _picture(pair: Pair) -> str:
    return f"{PICTURES}/{pair.number:06}.jpg"

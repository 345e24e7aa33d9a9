"""Flow of whole sources: pairs are read, sent, and written, in order and with bounded memory.

    sources -> pairs -> client (some requests under way) -> encoded files -> index

Every step but the last works on several pairs at a time.
"""

import asyncio
import csv
import io
import json
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Literal, Protocol

from flownet2 import storage, writers
from flownet2.client import AsyncClient
from flownet2.errors import Error, FlowError
from flownet2.formats import FormatError
from flownet2.manifest import Index, Row, agree, checksum, forget
from flownet2.models import Model
from flownet2.sources import Pair, Selection, Source, SourceError
from flownet2.writers import PICTURES, STRETCH, VIDEO, Options

PATIENCE_SECONDS = 300.0
"""How long a run waits for servers that are away."""


class RunError(Error):
    """A run that ended early; the message says at which file and what to do."""


class Progress(Protocol):
    """Who wants to know how far a run is."""

    def begin(self, name: str, pairs: int | None) -> None:
        """A source begins."""

    def advance(self) -> None:
        """A pair is written, or was there already."""

    def say(self, message: str) -> None:
        """A line for people."""


@dataclass(frozen=True)
class Plan:
    """What a run makes of which frames, and how."""

    selection: Selection = field(default_factory=Selection)
    options: Options = field(default_factory=Options)
    jobs: int = 8
    on_error: Literal["stop", "skip"] = "stop"
    overwrite: bool = False
    shard: tuple[int, int] = (0, 1)


@dataclass
class Totals:
    """Pairs computed, pairs that were there, and what was skipped: source, frames and reason."""

    computed: int = 0
    found: int = 0
    skipped: list[tuple[str, str, str]] = field(default_factory=list)


async def run(
    sources: Mapping[str, Source], folder: str, client: AsyncClient, plan: Plan, progress: Progress
) -> Totals:
    """Write the flow of sources below a folder.

    Raises:
        RunError: an error, unless they are to be skipped; what was computed before is written.
        ManifestError: the folder is of another run.
        FlowError: no server answers.
        OSError: the results cannot be written.
    """
    model = await client.model()
    index, count = plan.shard
    mine = {
        name: one for number, (name, one) in enumerate(sources.items()) if number % count == index
    }
    runner = _Runner(folder, client, plan, progress)
    await asyncio.to_thread(runner.prepare, sources, mine, model)
    await runner.run(mine)
    return runner.totals


class _Scale:
    """The scale of a source's video, known after its first pairs."""

    def __init__(self, known: float | None) -> None:
        self.value: asyncio.Future[float] = asyncio.get_running_loop().create_future()
        self._lengths: list[float] = []
        self._expected = STRETCH
        self.kept = known is not None
        """Whether a run that goes on will find it."""
        if known is not None:
            self.value.set_result(known)

    def add(self, length: float) -> None:
        """The longest motion of one of the first pairs."""
        self._lengths.append(length)
        self.expect(self._expected)

    def expect(self, pairs: int) -> None:
        """Wait for so many pairs and no more."""
        self._expected = min(pairs, self._expected)
        if len(self._lengths) >= self._expected and not self.value.done():
            self.value.set_result(max(self._lengths, default=1.0))


@dataclass(eq=False)
class _Target:
    """A source's folder while it is written."""

    name: str
    folder: str
    index: Index
    video: bool
    scale: _Scale
    expected: int | None = None
    pairs: int = 0


@dataclass(frozen=True)
class _Step:
    """What comes out of a source: a pair, its end, or why it cannot go on.

    `position` counts the pairs that are not there yet.
    """

    target: _Target
    pair: Pair | None = None
    position: int | None = None
    error: str = ""


class _Runner:
    def __init__(self, folder: str, client: AsyncClient, plan: Plan, progress: Progress) -> None:
        self.folder = folder
        self.client = client
        self.plan = plan
        self.options = plan.options
        self.progress = progress
        self.totals = Totals()
        self.slots = asyncio.Semaphore(plan.jobs)
        self.shown: _Target | None = None
        self.targets: set[_Target] = set()
        """Sources that are begun and not ended."""

    def prepare(
        self, sources: Mapping[str, Source], mine: Mapping[str, Source], model: Model
    ) -> None:
        """Agree with what is in the folder already."""
        if self.plan.overwrite:
            forget(self.folder)
            for name in mine:
                Index(storage.join(self.folder, name)).clear()
        identities = {}
        for name, source in sources.items():
            try:
                identities[name] = {"path": source.path, **source.identity()}
            except (SourceError, OSError) as error:
                if self.plan.on_error == "stop":
                    raise RunError(str(error)) from error
        options = {**asdict(self.plan.selection), **asdict(self.options)}
        network = {
            key: value
            for key, value in asdict(model).items()
            if key not in ("backend", "max_pixels", "default")  # they do not change the results
        }
        agree(self.folder, {"options": options, "model": network}, identities)

    async def run(self, sources: Mapping[str, Source]) -> None:
        """All steps of all sources, some under way at a time, finished in order."""
        window = max(2 * self.plan.jobs, STRETCH)
        under_way: deque[tuple[_Step, asyncio.Task[dict[str, bytes]] | None]] = deque()
        try:
            for name, source in sources.items():
                target = await self._begin(name)
                steps = self._steps(target, source)
                while step := await asyncio.to_thread(next, steps, None):
                    while len(under_way) >= window:
                        await self._finish(*under_way.popleft())
                    task = None
                    if step.pair and step.position is not None:
                        task = asyncio.create_task(self._compute(target, step.pair, step.position))
                    under_way.append((step, task))
                target.scale.expect(target.pairs)
            while under_way:
                await self._finish(*under_way.popleft())
        finally:
            tasks = [task for _, task in under_way if task]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            for target in self.targets:
                await asyncio.to_thread(target.index.flush)

    async def _begin(self, name: str) -> _Target:
        folder = storage.join(self.folder, name)
        index = await asyncio.to_thread(Index, folder)
        video = "mp4" in self.options.formats and not await asyncio.to_thread(index.has, VIDEO)
        scale = self.options.max_flow
        if video and scale is None and index.has(_SCALE):
            scale = json.loads(storage.read(storage.join(folder, _SCALE)))
        target = _Target(name, folder, index, video, _Scale(scale))
        self.targets.add(target)
        return target

    def _steps(self, target: _Target, source: Source) -> Iterator[_Step]:
        """A source's pairs, with what of them is there already, and its end."""
        try:
            target.expected = source.count(self.plan.selection)
            for pair in source.pairs(self.plan.selection):
                names = self.options.names(pair.stem)
                if target.video:
                    names.append(_picture(pair))
                done = all(target.index.has(name) for name in names)
                yield _Step(target, pair, None if done else target.pairs)
                target.pairs += not done
        except (Error, OSError) as error:
            yield _Step(target, error=str(error))
        yield _Step(target)

    async def _compute(self, target: _Target, pair: Pair, position: int) -> dict[str, bytes]:
        """A pair's files."""
        length = 1.0
        measured = target.video and position < STRETCH
        try:
            async with self.slots:
                result = await self.client.flow(
                    pair.first.frame, pair.second.frame, direction=self.options.asked
                )
            if measured:
                length = await asyncio.to_thread(writers.motion, result.flow)
        finally:
            if measured:
                target.scale.add(length)
        scale = await target.scale.value if target.video else 0.0

        def encode() -> dict[str, bytes]:
            files = dict(self.options.files(pair.stem, result))
            if target.video:
                beside = pair.first.frame.pixels() if self.options.side_by_side else None
                files[_picture(pair)] = writers.video_picture(result.flow, scale, beside)
            return files

        return await asyncio.to_thread(encode)

    async def _finish(self, step: _Step, task: asyncio.Task[dict[str, bytes]] | None) -> None:
        """Write what a step gave."""
        if step.target is not self.shown:
            self.shown = step.target
            self.progress.begin(step.target.name, step.target.expected)
        if step.pair is None:
            if step.error:
                await self._note(step.target, "", step.error)
            else:
                await asyncio.to_thread(self._end, step.target)
            return
        if task is None:
            self.totals.found += 1
        else:
            try:
                files = await task
            except (FlowError, FormatError) as error:
                if isinstance(error, FlowError) and error.unavailable:
                    raise
                names = f"{step.pair.first.name} and {step.pair.second.name}"
                await self._note(step.target, names, str(error))
                return
            await asyncio.to_thread(self._write, step.target, step.pair, files)
            self.totals.computed += 1
        self.progress.advance()

    def _write(self, target: _Target, pair: Pair, files: Mapping[str, bytes]) -> None:
        first, second = pair.first, pair.second
        if target.video and not target.scale.kept:
            target.index.write(_SCALE, json.dumps(target.scale.value.result()).encode())
            target.scale.kept = True
        for name, content in files.items():
            target.index.write(
                name, content, pair.number, (first.name, second.name), (first.time, second.time)
            )

    def _end(self, target: _Target) -> None:
        """Make the video of a source's pictures, and put its index in order."""
        rows = target.index.rows()
        kept = [row for row in rows if row.file.startswith(f"{PICTURES}/")]
        pictures = [row for row in kept if row.number is not None]
        if target.video and pictures:
            path = storage.join(target.folder, VIDEO)
            files = ((row.time, storage.join(target.folder, row.file)) for row in pictures)
            with storage.written_aside(path) as part:
                writers.write_video(part, files)
                target.index.note(Row(None, "", "", None, None, VIDEO, *checksum(part)))
        for row in kept:  # also those that a run left behind which was ended here
            target.index.drop(row.file)
        if kept:
            storage.remove(storage.join(target.folder, PICTURES))
        if rows:
            target.index.rewrite()
        self.targets.discard(target)

    async def _note(self, target: _Target, names: str, reason: str) -> None:
        """Keep an error in errors.csv; RunError if it is to stop the run."""
        if self.plan.on_error == "stop":
            if names:
                raise RunError(f"{target.name}, {names}: {reason}")
            await asyncio.to_thread(self._end, target)  # what could be read is kept
            raise RunError(reason)
        self.totals.skipped.append((target.name, names, reason))
        self.progress.say(f"skipped {target.name} {names}: {reason}")
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(
            [("source", "frames", "reason"), *self.totals.skipped]
        )
        index, count = self.plan.shard
        name = "errors.csv" if count == 1 else f"errors-{index}-of-{count}.csv"
        await asyncio.to_thread(
            storage.write, storage.join(self.folder, name), text.getvalue().encode()
        )


_SCALE = f"{PICTURES}/scale.json"


def _picture(pair: Pair) -> str:
    return f"{PICTURES}/{pair.number:06}.jpg"

"""Train a FlowNet2 network from nothing within a time budget.

    python -m training.train --network FlowNet2-c --minutes 100 --out runs/c

One sub-network after the other, each on the frozen ones before it, as in the paper; FlowNetC first
learns to match features. `--on` takes all but the last from a weights file instead:

    python -m training.train --network FlowNet2-cs --on weights/flownet2.safetensors --out runs/cs

`--minutes` (or `--steps`) drives the learning rate down to zero, so that the end of the budget is
the end of the schedule. Started again with the same arguments, a run goes on from its last
checkpoint, to the step: model, optimizer, schedule, random states and scenes.

The folder `--out` gets `checkpoint/` (pieces below 16 MB), `log.csv`, `validation.csv` and, where
matplotlib is installed, `curve.png`.
"""

from __future__ import annotations

import argparse
import csv
import ctypes
import io
import math
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from export.networks import (
    FLOW_SCALE,
    NETWORKS,
    SD_FLOW_SCALE,
    EncoderDecoder,
    FlowNet2,
    FlowNetC,
    Network,
)
from export.networks.operators import resample, upsample_aligned
from training.generator import Textures, load_textures, render
from training.loss import endpoint_error, matching_loss, multiscale_loss
from training.model import TrainingC, carry_flow, channel_means, initialise, standardise
from training.pool import Batch, ScenePool, photometric
from training.workers import Workers

PIECE_BYTES = 15_000_000
VALIDATION_SEED = 1 << 40  # far from the seeds of training scenes
EMA_DECAY = 0.998  # a step
EMA_EVERY = 4  # steps between updates of the average
MATCHING_WEIGHT = 0.3  # of the matching loss beside the flow loss, falling to zero half-way


class UnsupportedNetworkError(ValueError):
    """The network has a part that this program does not train."""


class ResumeError(ValueError):
    """A checkpoint belongs to a run with other arguments."""


@dataclass(frozen=True)
class Part:
    """One stretch of training with a learning-rate schedule of its own.

    `block` is the sub-network trained; `matching` trains FlowNetC's features alone; `share` of the
    whole budget.
    """

    block: str
    matching: bool
    share: float

    @property
    def name(self) -> str:
        return f"{self.block} {'matching' if self.matching else 'flow'}"


@dataclass(frozen=True)
class Phase:
    """Crop size, batch and size of motions from a given progress of a part on."""

    start: float
    crop: tuple[int, int]
    batch: int
    displacement: float


MATCHING_PHASES = (Phase(0.0, (192, 256), 8, 1.0),)
FLOW_PHASES = (
    Phase(0.0, (192, 256), 8, 0.8),
    Phase(0.45, (256, 320), 8, 1.0),
    Phase(0.75, (320, 448), 4, 1.0),
)
SHARES = {1: (1.0,), 2: (0.65, 0.35), 3: (0.5, 0.25, 0.25)}
MATCHING_SHARE = 0.12


def parts_of(network: Network, last_only: bool = False) -> list[Part]:
    """The parts in which a network, or the last one of its cascade, is trained; shares add up to
    one."""
    if network.fusion:
        raise UnsupportedNetworkError(
            f"{network.name} ends in a fusion network, which is not trained here; "
            "train its cascade FlowNet2-CSS or FlowNet2-css instead"
        )
    parts = []
    shares = SHARES[len(network.cascade)]
    for position, (kind, share) in enumerate(zip(network.cascade, shares, strict=True), start=1):
        block = "sd" if kind == "SD" else f"net{position}"
        matching = share * MATCHING_SHARE if kind == "C" else 0.0
        if matching:
            parts.append(Part(block, True, matching))
        parts.append(Part(block, False, share - matching))
    if last_only:
        return [Part(parts[-1].block, False, 1.0)]
    return parts


def cascade_before(network: Network, path: Path) -> tuple[FlowNet2, str]:
    """The cascade without its last network, from a weights file, and where that comes from.

    Raises:
        UnsupportedNetworkError: the cascade has one network only, or the file no stored means.
        WeightsError: the file is unreadable or of another network.
    """
    from export.weights import load_weights  # noqa: PLC0415 - asks for more than PyTorch and NumPy

    if len(network.cascade) == 1:
        raise UnsupportedNetworkError(f"{network.name} is one network: train it without --on")
    wanted = (network.cascade[:-1], network.width)
    before = next(one for one in NETWORKS.values() if (one.cascade, one.width) == wanted)
    model, file = load_weights(before, path)
    if model.pair_mean:
        raise UnsupportedNetworkError(f"{path.name} has no stored means; training subtracts those")
    return model, file.source


class Trainee(nn.Module):
    """One sub-network in training, reading what the frozen ones before it give.

    `scale` is the number of pixels in a unit of its predictions.
    """

    def __init__(self, model: FlowNet2, block: str) -> None:
        super().__init__()
        self.block = block
        self.scale = SD_FLOW_SCALE if block == "sd" else FLOW_SCALE
        module = model.blocks[block]
        self.module: nn.Module = TrainingC(module) if isinstance(module, FlowNetC) else module
        self.position = 1 if block == "sd" else int(block[3:])
        self._model = [model]  # in a list, so that it is no submodule of this one

    def inputs(self, images: Tensor) -> Tensor:
        """What an S or SD reads, from mean-free images [2, N, 3, H, W]."""
        model = self._model[0]
        if self.position == 1:
            return torch.cat((images[0], images[1]), 1)
        with torch.no_grad():
            first = (images[0], images[1])
            inputs = first if model.network.cascade[0] == "C" else (torch.cat(first, 1),)
            prediction = model.blocks["net1"](*inputs)[-1].float()
            for position in range(2, self.position):
                flow = upsample_aligned(prediction * FLOW_SCALE)
                refined = model.refiner_inputs(images[0], images[1], flow)
                prediction = model.blocks[f"net{position}"](refined)[-1].float()
            flow = upsample_aligned(prediction * FLOW_SCALE)
            return model.refiner_inputs(images[0], images[1], flow)

    def forward(self, images: Tensor) -> tuple[list[Tensor], Tensor | None]:
        """Predictions, coarsest first, and FlowNetC's cost volume."""
        images = images - self.means()
        if isinstance(self.module, TrainingC):
            features, cost = self.module.features(images)
            return self.module.decode(features, cost), cost
        inputs = self.inputs(images).contiguous(memory_format=torch.channels_last)
        return self.module(inputs), None

    def means(self) -> Tensor:
        """What is subtracted from the images: [2, 1, 3, 1, 1]."""
        return torch.stack((self._model[0].mean1, self._model[0].mean2))[:, None]

    def cost(self, images: Tensor) -> Tensor:
        """FlowNetC's cost volume alone."""
        assert isinstance(self.module, TrainingC)
        images = images - self.means()
        return self.module.features(images)[1]


def learning_rate(progress: float, peak: float) -> float:
    """Linear warm-up over the first 3 percent, then a cosine down to zero."""
    if progress < 0.03:
        return peak * (0.05 + 0.95 * progress / 0.03)
    return peak * 0.5 * (1 + math.cos(math.pi * min(1.0, (progress - 0.03) / 0.97)))


def save_checkpoint(folder: Path, state: dict[str, Any]) -> None:
    """Write `state` as pieces below 16 MB; an interrupted write leaves the last one whole."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    content = buffer.getvalue()
    fresh = folder.with_suffix(".new")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    for number, start in enumerate(range(0, len(content), PIECE_BYTES)):
        (fresh / f"{number:03}.bin").write_bytes(content[start : start + PIECE_BYTES])
    old = folder.with_suffix(".old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    fresh.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def has_checkpoint(folder: Path) -> bool:
    """Whether :func:`save_checkpoint` has written there."""
    return folder.exists() or folder.with_suffix(".old").exists()


def load_checkpoint(folder: Path) -> dict[str, Any]:
    """Read what :func:`save_checkpoint` wrote last, without executing anything in it."""
    if not folder.exists():  # a write was interrupted between its two renamings
        folder = folder.with_suffix(".old")
    content = b"".join(piece.read_bytes() for piece in sorted(folder.glob("*.bin")))
    state: dict[str, Any] = torch.load(io.BytesIO(content), weights_only=True, map_location="cpu")
    return state


class Trainer:
    """A run: its model, its place in the schedule, and everything to go on from there."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.device = torch.device(arguments.device)
        self.network = NETWORKS[arguments.network]
        self.parts = parts_of(self.network, arguments.on is not None)
        self.textures: Textures = load_textures(arguments.textures, self.device)
        self.model = FlowNet2(self.network)
        channel_means(self.model)
        self.source = "trained from nothing on synthetic pairs by this project's training.train, "
        if arguments.on:
            before, source = cascade_before(self.network, arguments.on)
            self.source = f"{source}, then its last network "
            self.model.load_state_dict(before.state_dict(), strict=False)
        self.model.to(self.device)
        self.workers = Workers(arguments.workers)
        self.random = torch.Generator().manual_seed(arguments.seed + (self.workers.rank << 16))
        self.step = 0  # over all parts
        self.elapsed = 0.0
        self.next_seed = (arguments.seed << 24) + (self.workers.rank << 34)
        self.part_index = 0
        self.checked = 0.0
        self.out: Path = arguments.out
        self.out.mkdir(parents=True, exist_ok=True)
        self.log: list[tuple[float, float]] = []
        if has_checkpoint(self.out / "checkpoint"):
            self.restore(load_checkpoint(self.out / "checkpoint"))
        else:
            self.begin_part()

    # -- schedule ---------------------------------------------------------------------------

    @property
    def part(self) -> Part:
        return self.parts[self.part_index]

    @property
    def total_progress(self) -> float:
        if self.arguments.steps:
            return self.step / float(self.arguments.steps)
        return self.elapsed / (60.0 * float(self.arguments.minutes))

    @property
    def progress(self) -> float:
        """Progress of this part, 0 to 1."""
        before = sum(part.share for part in self.parts[: self.part_index])
        return min(1.0, max(0.0, (self.total_progress - before) / self.part.share))

    @property
    def phase(self) -> Phase:
        phases = MATCHING_PHASES if self.part.matching else FLOW_PHASES
        return [phase for phase in phases if phase.start <= self.progress][-1]

    def scaled(self, phase: Phase) -> tuple[tuple[int, int], int, float]:
        """Crop, batch and motions of a phase under --batch and --crop."""
        crop = self.arguments.crop or phase.crop
        displacement = phase.displacement * (0.1 if self.part.block == "sd" else 1.0)
        return crop, max(1, round(phase.batch * self.arguments.batch / 8)), displacement

    # -- beginning and resuming -------------------------------------------------------------

    def begin_part(self) -> None:
        """Set up trainee, optimizer and scenes for the current part, from the model as it is."""
        part = self.part
        new_block = self.part_index == 0 or self.parts[self.part_index - 1].block != part.block
        if new_block:
            initialise(self.model.blocks[part.block], self.arguments.seed + self.part_index)
            self.take_trainee()
        self.open_pool(0)
        images = self.batch().images
        if new_block:
            standardise(self.trainee, lambda: self.trainee(images))
        elif isinstance(self.trainee.module, TrainingC):
            self.trainee.module.fold_temperature()
            stem = self.trainee.module.block.stem
            standardise(self.trainee, lambda: self.trainee(images), keep=stem)
        if isinstance(self.trainee.module, EncoderDecoder) and self.trainee.position > 1:
            carry_flow(self.trainee.module)
        # Every worker has standardised on images of its own.
        self.workers.share([parameter.data for parameter in self.trainee.parameters()])
        self.begin_optimizer()

    def take_trainee(self) -> None:
        trainee = Trainee(self.model, self.part.block).to(self.device)
        self.trainee = trainee.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        for frozen in list(self.model.blocks.values())[: trainee.position - 1]:
            frozen.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def begin_optimizer(self) -> None:
        """A fresh optimizer and average of the trainee's weights."""
        trained = [parameter for parameter in self.trainee.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": [p for p in trained if p.dim() > 1], "weight_decay": 1e-3},
                {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0},
            ],
            betas=(0.9, 0.99),
            fused=True,
        )
        self.ema = {name: value.detach().clone() for name, value in self.trainee.named_parameters()}
        self.part_step = 0

    def open_pool(self, rendered: int) -> None:
        phase = self.phase
        crop, _, displacement = self.scaled(phase)
        self.pool_phase = phase
        self.pool = ScenePool(
            self.textures, self.arguments.pool, crop, displacement, self.next_seed, rendered
        )

    def batch(self) -> Batch:
        if self.phase is not self.pool_phase:
            self.next_seed += self.pool.rendered
            self.open_pool(0)
        return self.pool.draw(self.scaled(self.phase)[1], self.arguments.reuse, self.random)

    def state(self) -> dict[str, Any]:
        return {
            "network": self.network.name,
            "source": self.source,
            "blocks": [part.block for part in self.parts],
            "model": self.model.state_dict(),
            "trainee": self.trainee.state_dict(),
            "ema": self.ema,
            "optimizer": self.optimizer.state_dict(),
            "workers": self.workers.gather(
                {
                    "random": self.random.get_state(),
                    "seed": self.next_seed,
                    "rendered": self.pool.rendered,
                    "owed": self.pool.owed,
                }
            ),
            "part": self.part_index,
            "part_step": self.part_step,
            "step": self.step,
            "elapsed": self.elapsed,
            "checked": self.checked,
        }

    def restore(self, state: dict[str, Any]) -> None:
        if state["network"] != self.network.name:
            raise ResumeError(
                f"{self.out} holds a run of {state['network']}; choose another --out, or "
                f"--network {state['network']}"
            )
        if state["blocks"] != [part.block for part in self.parts]:
            raise ResumeError(
                f"{self.out} holds a run with{'out' if self.arguments.on else ''} --on; choose "
                "another --out, or start it again as it was"
            )
        self.step, self.elapsed = state["step"], state["elapsed"]
        self.checked = state["checked"]
        self.part_index = state["part"]
        self.take_trainee()
        self.begin_optimizer()
        self.model.load_state_dict(state["model"])
        self.trainee.load_state_dict(state["trainee"])
        self.ema = {name: value.to(self.device) for name, value in state["ema"].items()}
        self.optimizer.load_state_dict(state["optimizer"])
        self.part_step = state["part_step"]
        if len(state["workers"]) != self.workers.count:
            raise ResumeError(
                f"{self.out} holds a run of {len(state['workers'])} workers; "
                f"go on with --workers {len(state['workers'])}"
            )
        own = state["workers"][self.workers.rank]
        self.next_seed = own["seed"]
        self.open_pool(own["rendered"])
        self.pool.owed = own["owed"]
        self.random.set_state(own["random"])

    def checkpoint(self) -> None:
        state = self.state()
        if self.workers.first:
            save_checkpoint(self.out / "checkpoint", state)

    # -- training ---------------------------------------------------------------------------

    def run(self) -> None:
        """Train to the end of the budget, with a checkpoint at every validation and at the end."""
        started = time.monotonic() - self.elapsed
        shown = 0.0
        while self.total_progress < 1.0:
            self.begin_due_part()
            loss, epe = self.train_step(time.monotonic() - started)
            self.log.append((loss, epe))
            if self.elapsed - shown > self.arguments.log_seconds or self.total_progress >= 1.0:
                self.write_log()
                shown = self.elapsed
            if self.elapsed - self.checked > 60 * self.arguments.validate_minutes:
                self.checked = self.elapsed
                if not self.part.matching:
                    self.write_validation()
                self.checkpoint()
        if not self.part.matching:
            self.write_validation()
        self.checkpoint()

    def begin_due_part(self) -> None:
        """At the end of a part, leave its averaged weights in the model and begin the next."""
        if self.progress >= 1.0 and self.part_index + 1 < len(self.parts):
            self.settle()
            self.part_index += 1
            self.begin_part()

    def settle(self) -> None:
        """Put the averaged weights into the model, as the plain network reads them."""
        with torch.no_grad():
            for name, parameter in self.trainee.named_parameters():
                parameter.copy_(self.ema[name])
        if isinstance(self.trainee.module, TrainingC):
            self.trainee.module.fold()

    def train_step(self, elapsed: float) -> tuple[float, float]:
        """One step; the loss, and the end-point error in pixels (or the matching loss again).

        `elapsed` becomes the run's time, averaged over the workers, who thereby agree on the
        schedule.
        """
        batch = self.batch()
        rate = learning_rate(self.progress, self.arguments.learning_rate)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        with torch.autocast(self.device.type, torch.bfloat16, enabled=not self.arguments.exact):
            if self.part.matching:
                cost, predictions = self.trainee.cost(batch.images), None
            else:
                predictions, cost = self.trainee(batch.images)
        loss = torch.zeros((), device=self.device)
        weight = 1.0 if self.part.matching else MATCHING_WEIGHT * max(0.0, 1 - 2 * self.progress)
        if cost is not None and weight > 0:
            module = self.trainee.module
            assert isinstance(module, TrainingC)
            logits, nothing = module.logits(cost)
            loss = loss + weight * matching_loss(logits, batch.flow, batch.occluded, nothing)
        epe = loss.detach()
        if predictions is not None:
            loss = loss + multiscale_loss(predictions, batch.flow, self.trainee.scale)
            finest = predictions[-1].detach()
            truth = nn.functional.adaptive_avg_pool2d(batch.flow, finest.shape[2:])
            epe = endpoint_error(finest * self.trainee.scale, truth)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.elapsed, shown_loss, shown_epe = self.workers.average_gradients(
            self.trainee, [elapsed, float(loss.detach()), float(epe)]
        )
        nn.utils.clip_grad_norm_(self.trainee.parameters(), 1.0)
        self.optimizer.step()
        self.step += 1
        self.part_step += 1
        if self.part_step % EMA_EVERY == 0:
            decay = min(EMA_DECAY, (1 + self.part_step) / (10 + self.part_step)) ** EMA_EVERY
            current = [parameter.detach() for parameter in self.trainee.parameters()]
            torch._foreach_lerp_(list(self.ema.values()), current, 1 - decay)
        return shown_loss, shown_epe

    # -- validation and log -----------------------------------------------------------------

    def validate(self) -> tuple[float, float]:
        """End-point error of the averaged weights on held-out whole images, and of zero flow."""
        kept = {name: value.detach().clone() for name, value in self.trainee.named_parameters()}
        error = zero = 0.0
        with torch.no_grad():
            for name, parameter in self.trainee.named_parameters():
                parameter.copy_(self.ema[name])
            for batch in self.validation_batches():
                with torch.autocast(
                    self.device.type, torch.bfloat16, enabled=not self.arguments.exact
                ):
                    predictions, _ = self.trainee(batch.images)
                finest = predictions[-1].float() * self.trainee.scale
                flow = resample(finest, *batch.flow.shape[2:])
                error += float(endpoint_error(flow, batch.flow))
                zero += float(endpoint_error(torch.zeros_like(flow), batch.flow))
            for name, parameter in self.trainee.named_parameters():
                parameter.copy_(kept[name])
        share = self.workers.count / self.arguments.validation
        error, zero = self.workers.average([error * share, zero * share])
        return error, zero

    def validation_batches(self) -> Iterator[Batch]:
        """This worker's part of `--validation` batches of four images, the same every time."""
        height, width = self.arguments.crop or (384, 512)
        displacement = 0.1 if self.part.block == "sd" else 1.0
        for number in range(self.workers.rank, self.arguments.validation, self.workers.count):
            scenes = render(
                VALIDATION_SEED + number, 4, height, width, self.textures, displacement, False
            )
            random = torch.Generator().manual_seed(VALIDATION_SEED + number)
            yield Batch(photometric(scenes.frames, random), scenes.flow, scenes.occluded)

    def write_log(self) -> None:
        loss, epe = (sum(values) / len(values) for values in zip(*self.log, strict=True))
        self.log = []
        if not self.workers.first:
            return
        rate = self.optimizer.param_groups[0]["lr"]
        crop, batch, _ = self.scaled(self.phase)
        append_row(
            self.out / "log.csv",
            {
                "part": self.part.name,
                "step": self.step,
                "seconds": round(self.elapsed, 1),
                "height": crop[0],
                "width": crop[1],
                "batch": batch,
                "learning_rate": f"{rate:.3e}",
                "loss": f"{loss:.4f}",
                "epe": f"{epe:.4f}",
            },
        )
        left = self.elapsed / self.total_progress - self.elapsed
        done = int(30 * min(1.0, self.total_progress))
        what = "loss" if self.part.matching else "EPE"
        print(
            f"[{'#' * done}{'.' * (30 - done)}] {self.part.name} step {self.step} "
            f"{what} {epe:.3f}  {int(left // 60)}:{int(left % 60):02} left",
            end="\r" if sys.stdout.isatty() else "\n",
            flush=True,
        )

    def write_validation(self) -> None:
        error, zero = self.validate()
        if not self.workers.first:
            return
        append_row(
            self.out / "validation.csv",
            {
                "part": self.part.name,
                "step": self.step,
                "seconds": round(self.elapsed, 1),
                "epe": f"{error:.4f}",
                "zero_flow": f"{zero:.4f}",
            },
        )
        print(f"\nvalidation EPE {error:.3f} (zero flow {zero:.3f})", flush=True)
        plot(self.out)


def append_row(path: Path, row: dict[str, Any]) -> None:
    """Append to a CSV file, which begins with the keys of its first row."""
    fresh = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(row))
        if fresh:
            writer.writeheader()
        writer.writerow(row)


def plot(folder: Path) -> None:
    """Training and validation error over time as `curve.png`, where matplotlib is installed."""
    try:
        from matplotlib.figure import Figure  # noqa: PLC0415 - the only use, and optional
    except ImportError:
        return
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name, label in (("log.csv", "training crops"), ("validation.csv", "validation, whole")):
        if not (folder / name).exists():
            continue
        with (folder / name).open(newline="") as file:
            rows = [row for row in csv.DictReader(file) if row["part"].endswith("flow")]
        minutes = [float(row["seconds"]) / 60 for row in rows]
        axes.plot(minutes, [float(row["epe"]) for row in rows], label=label)
    axes.set(xlabel="minutes", ylabel="end-point error, pixels")
    axes.set_ylim(bottom=0)
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(folder / "curve.png", dpi=110)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line; without `argv`, the process's own."""
    parser = argparse.ArgumentParser(prog="python -m training.train", description=__doc__)
    parser.add_argument("--network", default="FlowNet2-c", choices=sorted(NETWORKS))
    parser.add_argument("--minutes", type=float, default=25.0, help="time budget")
    parser.add_argument("--steps", type=int, help="budget in steps, instead of --minutes")
    parser.add_argument("--out", type=Path, required=True, help="folder of the run")
    parser.add_argument(
        "--on", type=Path, help="weights of the cascade but for its last network, trained alone"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--textures", type=Path, help="file of training.textures")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--batch", type=int, default=8, help="samples a step at 192x256")
    parser.add_argument("--learning-rate", type=float, default=4e-4, help="its peak")
    parser.add_argument("--reuse", type=float, default=12.0, help="uses of each rendered scene")
    parser.add_argument("--pool", type=int, default=128, help="scenes kept for reuse")
    parser.add_argument("--validation", type=int, default=6, help="validation batches of four")
    parser.add_argument("--validate-minutes", type=float, default=5.0)
    parser.add_argument("--log-seconds", type=float, default=20.0)
    parser.add_argument("--workers", type=int, default=1, help="processes, --batch samples each")
    parser.add_argument("--threads", type=int, help="CPU threads of each worker")
    parser.add_argument(
        "--crop", type=int, nargs=2, help="fixed crop height and width, multiples of 64"
    )
    parser.add_argument("--exact", action="store_true", help="float32 instead of bfloat16")
    arguments = parser.parse_args(argv)
    if arguments.device == "auto":
        arguments.device = "cuda" if torch.cuda.is_available() else "cpu"
    if arguments.crop:
        arguments.crop = tuple(arguments.crop)
    return arguments


def keep_memory() -> None:
    """Have glibc keep freed memory instead of returning it to the system after each large tensor.

    Page faults on fresh memory otherwise take most of a CPU step's time, above all in virtual
    machines. Does nothing where the C library has no `mallopt`.
    """
    trim_threshold, top_pad, mmap_max = -1, -2, -4
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return
    mallopt(mmap_max, 0)
    mallopt(trim_threshold, 2**31 - 1)
    mallopt(top_pad, 256 << 20)


def main() -> None:
    """The command line."""
    keep_memory()
    arguments = parse()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    Trainer(arguments).run()


if __name__ == "__main__":
    main()

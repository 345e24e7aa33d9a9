"""Train one or more sub-networks of a FlowNet2 network within a budget of time or steps.

    python -m training.train --network FlowNet2-c --minutes 100 --out runs/c
    python -m training.train --network FlowNet2-cs --from runs/c.safetensors --out runs/cs

The last sub-network is trained, or those that `--train` names, together. `--from` gives weights to
begin with: a sub-network in training that no file holds is trained from scratch, the others are
frozen, as in the paper. A FlowNetC from scratch first learns to match features.

On a CPU, one process for each core gets farther than one of several threads; each takes `--batch`
samples a step:

    torchrun --nproc-per-node 2 -m training.train …

The learning rate goes down to zero at the end of the budget, `--minutes` or `--steps`. Started
again with the same arguments, a run goes on from its last checkpoint, to the step: model,
optimizer, schedule, random states and scenes.

The folder `--out` gets `checkpoint.pt`, `log.csv`, and, with `--validation`, a folder of pairs,
`validation.csv`; where matplotlib is installed, `curve.png`.
"""

from __future__ import annotations

import argparse
import csv
import ctypes
import math
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from export.networks import NETWORKS, EncoderDecoder, FlowNet2
from export.networks.operators import resample
from flownet2.measures import end_point_error
from training.loss import LEVEL_WEIGHTS, endpoint_error, matching_loss, multiscale_loss
from training.model import carry_flow, channel_means, initialise, initialise_from_data
from training.pairs import Pair, read_pairs
from training.pool import SMALL, Batch, ScenePool
from training.textures import Textures
from training.trainee import Trainee, take_weights
from training.workers import Workers

AVERAGE_DECAY = 0.998  # a step
AVERAGE_EVERY = 4  # steps between updates of the average
MATCHING_WEIGHT = 0.3  # of the matching loss beside the flow loss, falling to zero half-way
TEMPERATURE_FACTOR = (
    20.0  # between the learning rate of the matching loss's two scalars and others'
)


@dataclass(frozen=True)
class Phase:
    """Crop size, batch and size of motions from a given progress of a part on."""

    start: float
    crop: tuple[int, int]
    batch: int
    displacement: float


@dataclass(frozen=True)
class Stage:
    """One stretch of a run with a learning-rate schedule of its own, `share` of the budget.

    `matching` trains FlowNetC's features alone.
    """

    share: float
    matching: bool
    phases: tuple[Phase, ...]


FLOW_PHASES = (
    Phase(0.0, (192, 256), 8, 0.8),
    Phase(0.45, (256, 320), 8, 1.0),
    Phase(0.75, (320, 448), 4, 1.0),
)
TUNING_PHASES = (Phase(0.0, (256, 320), 8, 1.0), Phase(0.75, (320, 448), 4, 1.0))
FLOW = (Stage(1.0, False, FLOW_PHASES),)
TUNING = (Stage(1.0, False, TUNING_PHASES),)
MATCHING_FIRST = (
    Stage(0.12, True, (Phase(0.0, (192, 256), 8, 1.0),)),
    Stage(0.88, False, FLOW_PHASES),
)


def learning_rate(progress: float, peak: float) -> float:
    """Linear warm-up over the first 3 percent, then a cosine down to zero."""
    if progress < 0.03:
        return peak * (0.05 + 0.95 * progress / 0.03)
    return peak * 0.5 * (1 + math.cos(math.pi * min(1.0, (progress - 0.03) / 0.97)))


def follow(
    averages: tuple[Tensor, ...] | list[Tensor],
    weights: tuple[Tensor, ...] | list[Tensor],
    updates: Tensor | int,
) -> None:
    """Move the running averages towards the weights, faster at first."""
    steps = AVERAGE_EVERY * int(updates)
    decay = min(AVERAGE_DECAY, (1 + steps) / (10 + steps)) ** AVERAGE_EVERY
    torch._foreach_lerp_(averages, weights, 1 - decay)


class Trainer:
    """A run: its model, its place in the schedule, and everything to go on from there."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.device = torch.device(arguments.device)
        self.textures = Textures(arguments.textures)
        self.workers = Workers()
        self.validation: list[Pair] = []
        if arguments.validation:
            pairs = list(read_pairs(arguments.validation))
            self.validation = pairs[self.workers.rank :: self.workers.count]
            self.families = sorted({pair.family for pair in pairs})
        self.model = FlowNet2(NETWORKS[arguments.network])
        self.blocks: list[str] = arguments.train or [list(self.model.blocks)[-1]]
        if self.model.network.fusion or not set(self.blocks) <= set(self.model.blocks):
            raise ValueError(
                f"{' and '.join(self.blocks)} of {arguments.network} cannot be trained: choose a "
                "network without fusion, and some of its net1, net2, net3 or sd"
            )
        self.random = torch.Generator().manual_seed(arguments.seed + (self.workers.rank << 16))
        self.step = 0
        self.elapsed = 0.0
        self.next_seed = (arguments.seed << 24) + (self.workers.rank << 34)
        self.checked = 0.0
        self.out: Path = arguments.out
        self.out.mkdir(parents=True, exist_ok=True)
        self.log: list[tuple[float, float]] = []
        self.checkpoint_file = self.out / "checkpoint.pt"
        if self.checkpoint_file.exists():
            self.restore(torch.load(self.checkpoint_file, weights_only=True, map_location="cpu"))
        else:
            self.begin()

    # -- schedule ---------------------------------------------------------------------------

    @property
    def stages(self) -> tuple[Stage, ...]:
        if not self.fresh:
            return TUNING
        return MATCHING_FIRST if "net1" in self.fresh and self.trainee.matcher else FLOW

    @property
    def stage(self) -> Stage:
        return self.stages[self.stage_index]

    @property
    def total_progress(self) -> float:
        if self.arguments.steps:
            return self.step / float(self.arguments.steps)
        return self.elapsed / (60.0 * float(self.arguments.minutes))

    @property
    def progress(self) -> float:
        """Progress of this stage, 0 to 1."""
        before = sum(stage.share for stage in self.stages[: self.stage_index])
        return min(1.0, max(0.0, (self.total_progress - before) / self.stage.share))

    @property
    def phase(self) -> Phase:
        return [phase for phase in self.stage.phases if phase.start <= self.progress][-1]

    def scaled(self, phase: Phase) -> tuple[tuple[int, int], int, float]:
        """Crop, batch and motions of a phase under --batch and --crop."""
        crop = self.arguments.crop or phase.crop
        displacement = phase.displacement * (SMALL if "sd" in self.blocks else 1.0)
        return crop, max(1, round(phase.batch * self.arguments.batch / 8)), displacement

    # -- beginning and resuming -------------------------------------------------------------

    def begin(self) -> None:
        """Take the weights of --from, and initialise what is trained from scratch."""
        channel_means(self.model)
        self.source = "trained from scratch on synthetic pairs by this project's training.train, "
        given: set[str] = set()
        for path in self.arguments.weights:
            blocks, source = take_weights(self.model, path)
            given |= blocks
            origin = source.partition(", ")[0]  # without the runs in between
            self.source = f"{origin}, lastly {' and '.join(self.blocks)}, "
        self.fresh = [block for block in self.blocks if block not in given]
        self.stage_index = 0
        for number, block in enumerate(self.fresh):
            initialise(self.model.blocks[block], self.arguments.seed + number)
        self.take_trainee()
        missing = [name for name in self.trainee.names if name not in given | set(self.fresh)]
        if missing:
            raise ValueError(
                f"{missing[0]} would stay as it is, but no file has it: give its weights with "
                "--from, or train it first"
            )
        if self.trainee.matcher is not None and "net1" not in self.fresh:
            self.trainee.matcher.unfold()
        self.open_pool(0)
        images = self.batch().images
        parts = [part for block in self.fresh for part in self.trainee.modules_of(block)]
        initialise_from_data(parts, lambda: self.trainee(images))
        for block in self.fresh:
            module = self.model.blocks[block]
            if isinstance(module, EncoderDecoder) and block not in ("net1", "sd"):
                carry_flow(module)
        self.begin_stage()

    def begin_stage(self) -> None:
        # Every worker has initialised on images of its own.
        self.workers.share([parameter.data for parameter in self.trainee.parameters()])
        self.begin_optimizer()

    def take_trainee(self) -> None:
        trainee = Trainee(self.model, self.blocks).to(self.device)
        self.trainee = trainee.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def begin_optimizer(self) -> None:
        """A fresh optimizer and average of the trained weights."""
        trained = self.trainee.trained()
        matcher = self.trainee.matcher
        temperature = [] if matcher is None else [matcher.log_factor, matcher.no_match]
        others = [p for p in trained.values() if all(p is not scalar for scalar in temperature)]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": [p for p in others if p.dim() > 1], "weight_decay": 1e-3, "factor": 1.0},
                {"params": [p for p in others if p.dim() <= 1], "weight_decay": 0.0, "factor": 1.0},
                {"params": temperature, "weight_decay": 0.0, "factor": TEMPERATURE_FACTOR},
            ],
            betas=(0.9, 0.99),
            fused=True,
        )
        self.average = AveragedModel(self.trainee, multi_avg_fn=follow)
        self.stage_step = 0

    def open_pool(self, rendered: int) -> None:
        phase = self.phase
        crop, _, displacement = self.scaled(phase)
        self.pool_phase = phase
        self.pool = ScenePool(
            self.textures,
            self.arguments.pool,
            crop,
            displacement,
            self.arguments.small_motions,
            self.next_seed,
            rendered,
            self.device,
        )

    def batch(self) -> Batch:
        if self.phase is not self.pool_phase:
            self.next_seed += self.pool.rendered
            self.open_pool(0)
        return self.pool.draw(self.scaled(self.phase)[1], self.arguments.reuse, self.random)

    def state(self) -> dict[str, Any]:
        return {
            "network": self.model.network.name,
            "blocks": self.blocks,
            "fresh": self.fresh,
            "source": self.source,
            "trainee": self.trainee.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "workers": self.workers.gather(
                {
                    "random": self.random.get_state(),
                    "seed": self.next_seed,
                    "rendered": self.pool.rendered,
                    "owed": self.pool.owed,
                }
            ),
            "stage": self.stage_index,
            "stage_step": self.stage_step,
            "step": self.step,
            "elapsed": self.elapsed,
            "checked": self.checked,
        }

    def restore(self, state: dict[str, Any]) -> None:
        for name, held, asked in (
            ("--network", state["network"], self.model.network.name),
            ("--train", state["blocks"], self.blocks),
            ("--nproc-per-node", len(state["workers"]), self.workers.count),
        ):
            if held != asked:
                raise ValueError(
                    f"{self.out} holds a run of {name} {held}: go on with that, or choose another "
                    "--out"
                )
        self.step, self.elapsed = state["step"], state["elapsed"]
        self.checked, self.source = state["checked"], state["source"]
        self.fresh, self.stage_index = state["fresh"], state["stage"]
        self.take_trainee()
        self.begin_optimizer()
        self.trainee.load_state_dict(state["trainee"])
        self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.stage_step = state["stage_step"]
        own = state["workers"][self.workers.rank]
        self.next_seed = own["seed"]
        self.open_pool(own["rendered"])
        self.pool.owed = own["owed"]
        self.random.set_state(own["random"])

    def checkpoint(self) -> None:
        state = self.state()
        if self.workers.first:
            fresh = self.out / "checkpoint.new"
            torch.save(state, fresh)
            os.replace(fresh, self.checkpoint_file)

    # -- training ---------------------------------------------------------------------------

    def run(self) -> None:
        """Train to the end of the budget, with a checkpoint at every validation and at the end."""
        started = time.monotonic() - self.elapsed
        shown = self.elapsed
        if self.step == 0 and not self.fresh:
            self.write_validation()
        while self.total_progress < 1.0:
            self.end_stage()
            loss, epe = self.train_step(time.monotonic() - started)
            self.log.append((loss, epe))
            if self.elapsed - shown > self.arguments.log_seconds or self.total_progress >= 1.0:
                self.write_log()
                shown = self.elapsed
            if self.elapsed - self.checked > 60 * self.arguments.validate_minutes:
                self.checked = self.elapsed
                self.write_validation()
                self.checkpoint()
        self.write_validation()
        self.checkpoint()

    def end_stage(self) -> None:
        """After matching, leave its averaged weights in the model and begin to train flow."""
        if self.progress < 1.0 or self.stage_index + 1 == len(self.stages):
            return
        self.trainee.load_state_dict(self.average.module.state_dict())
        self.stage_index += 1
        images = self.batch().images
        matcher = self.trainee.matcher
        assert matcher is not None
        matcher.fold_temperature()
        initialise_from_data(matcher.after_features(), lambda: self.trainee(images))
        self.begin_stage()

    def train_step(self, elapsed: float) -> tuple[float, float]:
        """One step; the loss, and the end-point error in pixels (or the matching loss again).

        `elapsed` becomes the run's time, averaged over the workers, who thereby agree on the
        schedule.

        Raises:
            FloatingPointError: the loss is not a finite number.
        """
        batch = self.batch()
        rate = learning_rate(self.progress, self.arguments.learning_rate)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["factor"]
        matching = self.stage.matching
        with self.autocast():
            if matching:
                predictions, cost = [], self.trainee.cost(batch.images)
            else:
                predictions, cost = self.trainee(batch.images)
        loss = torch.zeros((), device=self.device)
        weight = 1.0 if matching else MATCHING_WEIGHT * max(0.0, 1 - 2 * self.progress)
        if cost is not None and "net1" in self.fresh and weight > 0:
            assert self.trainee.matcher is not None
            logits, no_match = self.trainee.matcher.logits(cost)
            loss = loss + weight * matching_loss(logits, batch.flow, batch.occluded, no_match)
        epe = loss.detach()
        for levels in predictions:
            loss = loss + multiscale_loss(
                levels,
                batch.flow,
                self.trainee.scale,
                LEVEL_WEIGHTS[self.arguments.level_weights],
                self.arguments.exponent,
            )
            finest = levels[-1].detach()
            truth = nn.functional.adaptive_avg_pool2d(batch.flow, finest.shape[2:])
            epe = endpoint_error(finest * self.trainee.scale, truth)
        shown = torch.stack((loss.detach(), epe)).tolist()  # the one wait for a GPU in a step
        if not math.isfinite(shown[0]):  # a NaN flow ends grid_sample's backward pass in a crash
            raise FloatingPointError(
                f"the loss of step {self.step} is {shown[0]}; go on from the checkpoint with a "
                "lower --learning-rate"
            )
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.elapsed, shown_loss, shown_epe = self.workers.average_gradients(
            self.trainee, [elapsed, *shown]
        )
        nn.utils.clip_grad_norm_(self.trainee.trained().values(), 1.0)
        self.optimizer.step()
        self.step += 1
        self.stage_step += 1
        if self.stage_step % AVERAGE_EVERY == 0:
            self.average.update_parameters(self.trainee)
        return shown_loss, shown_epe

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=not self.arguments.float32)

    # -- validation and log -----------------------------------------------------------------

    def validate(self) -> list[float]:
        """Mean end-point error of the averaged weights on each family of the validation pairs."""
        sums = {family: [0.0, 0.0] for family in self.families}
        for pair in self.validation:
            images = torch.from_numpy(np.stack(pair.frames)[..., ::-1].copy())
            images = images.permute(0, 3, 1, 2)[:, None].to(self.device).float() / 255
            with torch.no_grad(), self.autocast():
                predictions, _ = self.average(images)
            finest = predictions[-1][-1].float() * self.trainee.scale
            flow = resample(finest, *images.shape[3:])[0].permute(1, 2, 0).cpu().numpy()
            error = end_point_error(flow, pair.flow)[pair.valid].mean()
            sums[pair.family][0] += float(error)
            sums[pair.family][1] += 1
        flat = self.workers.average([value for both in sums.values() for value in both])
        return [error / count for error, count in zip(flat[::2], flat[1::2], strict=True)]

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
                "stage": "matching" if self.stage.matching else "flow",
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
        left = max(0.0, self.elapsed / self.total_progress - self.elapsed)
        done = int(30 * min(1.0, self.total_progress))
        what = "matching loss" if self.stage.matching else "EPE"
        print(
            f"[{'#' * done}{'.' * (30 - done)}] step {self.step} {what} {epe:.3f}  "
            f"{int(left // 60)}:{int(left % 60):02} left",
            end="\r" if sys.stdout.isatty() else "\n",
            flush=True,
        )

    def write_validation(self) -> None:
        if self.stage.matching or not self.arguments.validation:
            return
        errors = dict(zip(self.families, self.validate(), strict=True))
        if not self.workers.first:
            return
        row = {"step": self.step, "seconds": round(self.elapsed, 1)}
        append_row(
            self.out / "validation.csv",
            row | {family: f"{error:.4f}" for family, error in errors.items()},
        )
        print(
            "\nvalidation EPE "
            + ", ".join(f"{family} {error:.3f}" for family, error in errors.items()),
            flush=True,
        )
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
    for name in ("log.csv", "validation.csv"):
        if not (folder / name).exists():
            continue
        with (folder / name).open(newline="") as file:
            rows = [row for row in csv.DictReader(file) if row.get("stage") != "matching"]
        curves = {"epe": "training crops"} if name == "log.csv" else {}
        curves |= {key: f"validation, {key}" for key in rows[0] if name != "log.csv"}
        minutes = [float(row["seconds"]) / 60 for row in rows]
        for key, label in curves.items():
            if key not in ("step", "seconds"):
                axes.plot(minutes, [float(row[key]) for row in rows], label=label)
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
        "--from",
        dest="weights",
        type=Path,
        action="append",
        default=[],
        help="weights file to begin with; repeatable, the last one that has a sub-network counts",
    )
    parser.add_argument(
        "--train", nargs="+", metavar="BLOCK", help="net1, net2, …; the last one if left out"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--textures", type=Path, help="folder of training.collect's output")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--batch", type=int, default=8, help="samples a step at 192x256")
    parser.add_argument("--learning-rate", type=float, default=4e-4, help="its peak")
    parser.add_argument("--reuse", type=float, default=8.0, help="uses of each rendered scene")
    parser.add_argument("--pool", type=int, default=128, help="scenes kept for reuse")
    parser.add_argument(
        "--small-motions",
        type=float,
        default=0.0,
        help="share of scenes with a tenth of the motion",
    )
    parser.add_argument("--level-weights", default="paper", choices=sorted(LEVEL_WEIGHTS))
    parser.add_argument(
        "--exponent",
        type=float,
        default=1.0,
        help="of the error in the loss; 0.4 for small motions",
    )
    parser.add_argument(
        "--validation", type=Path, help="folder of pairs, of multiples of 64 pixels"
    )
    parser.add_argument("--validate-minutes", type=float, default=5.0)
    parser.add_argument("--log-seconds", type=float, default=20.0)
    parser.add_argument(
        "--crop", type=int, nargs=2, help="fixed crop height and width, multiples of 64"
    )
    parser.add_argument("--float32", action="store_true", help="instead of bfloat16")
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
    torch.backends.cudnn.benchmark = True  # sizes stay the same for thousands of steps
    try:
        trainer = Trainer(parse())
    except (ValueError, OSError) as error:  # an argument that cannot be
        sys.exit(f"error: {error}")
    trainer.run()


if __name__ == "__main__":
    main()

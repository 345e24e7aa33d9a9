"""Train one or more sub-networks of a FlowNet2 network within a budget of time or steps.

    python -m training.train --network FlowNet2-c --minutes 100 --out runs/c
    python -m training.train --network FlowNet2-cs --from runs/c.safetensors --out runs/cs

By default the last sub-network is trained; `--train` names others, which are trained together.
`--from` gives initial weights. A sub-network without weights in any file is trained from scratch.
Sub-networks that are not trained stay frozen, as in the paper. A FlowNetC trained from scratch
first learns to match features.

On a CPU, one process per core is faster than one process with several threads. `--batch` is the
number of samples per process and step:

    torchrun --nproc-per-node 2 -m training.train …

The learning rate falls to zero at the end of the budget (`--minutes` or `--steps`). The same
command resumes from the last checkpoint, with the exact model, optimizer, schedule, random states
and scenes of its step.

The folder `--out` gets `checkpoint.pt` and `log.csv`; with `--validation`, a folder of pairs, also
`validation.csv` and, if matplotlib is installed, `curve.png`.
"""

from __future__ import annotations

import argparse
import ctypes
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from export.networks import NETWORKS, EncoderDecoder, FlowNet2
from export.networks.operators import resample
from flownet2.contract import adapted
from flownet2.datasets import DATASETS
from flownet2.errors import Error
from training.data import load_crops, read_sources
from training.generator import SMALL_MOTIONS, Mixture
from training.log import append_row, plot, print_progress
from training.loss import LEVEL_WEIGHTS, endpoint_error, matching_loss, multiscale_loss
from training.model import carry_flow, channel_means, initialise, initialise_from_data
from training.pool import Batch, ScenePool, collate
from training.schedule import FLOW, MATCHING_FIRST, TUNING, Phase, Schedule, Stage
from training.textures import Textures
from training.trainee import Trainee, take_weights
from training.validation import Validation
from training.workers import Workers

AVERAGE_DECAY = 0.998  # per step
AVERAGE_EVERY = 4  # steps between updates of the average
MATCHING_WEIGHT = 0.3  # of the matching loss beside the flow loss; falls to zero half-way
TEMPERATURE_FACTOR = 20.0  # factor of the learning rate for the matching loss's two scalars


def update_average(
    averages: tuple[Tensor, ...] | list[Tensor],
    weights: tuple[Tensor, ...] | list[Tensor],
    updates: Tensor | int,
) -> None:
    """Move the running averages towards the weights, in larger steps at first."""
    steps = AVERAGE_EVERY * int(updates)
    decay = min(AVERAGE_DECAY, (1 + steps) / (10 + steps)) ** AVERAGE_EVERY
    torch._foreach_lerp_(averages, weights, 1 - decay)


class Trainer:
    """A training run: model, optimizer, schedule and scenes, with checkpoints to resume from.

    Raises:
        ValueError, OSError: an argument is invalid, or the checkpoint belongs to another run.
    """

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.device = torch.device(arguments.device)
        self.textures = Textures(arguments.textures)
        self.workers = Workers()
        self.sources = read_sources(arguments.data, arguments.holdout)
        self.data_share = sum(source.share for source in self.sources)
        self.validation = Validation(arguments.validation, self.sources, self.workers)
        self.model = FlowNet2(NETWORKS[arguments.network])
        self.blocks: list[str] = arguments.train or [list(self.model.blocks)[-1]]
        if self.model.network.fusion or not set(self.blocks) <= set(self.model.blocks):
            raise ValueError(
                f"{' and '.join(self.blocks)} of {arguments.network} cannot be trained: choose a "
                "network without fusion, and some of its net1, net2, net3 or sd"
            )
        self.random = torch.Generator().manual_seed(arguments.seed + (self.workers.rank << 16))
        self.next_seed = (arguments.seed << 24) + (self.workers.rank << 34)
        self.checked = 0.0
        self.drawn = self.loaded = 0  # number of crops so far: all, and from datasets
        self.out: Path = arguments.out
        self.out.mkdir(parents=True, exist_ok=True)
        self.log: list[tuple[float, float]] = []
        self.checkpoint_file = self.out / "checkpoint.pt"
        if self.checkpoint_file.exists():
            self.restore(torch.load(self.checkpoint_file, weights_only=True, map_location="cpu"))
        else:
            self.start()

    # -- starting and resuming --------------------------------------------------------------

    def start(self) -> None:
        """Load the weights of --from, and initialise the blocks that are trained from scratch."""
        channel_means(self.model)
        self.source = "trained from scratch on synthetic pairs by this project's training.train, "
        loaded: set[str] = set()
        for path in self.arguments.weights:
            blocks, source = take_weights(self.model, path)
            loaded |= blocks
            origin = source.partition(", ")[0]  # the first run only, without the runs in between
            self.source = f"{origin}, lastly {' and '.join(self.blocks)}, "
        self.fresh = [block for block in self.blocks if block not in loaded]
        for number, block in enumerate(self.fresh):
            initialise(self.model.blocks[block], self.arguments.seed + number)
        self.wrap_model()
        missing = [name for name in self.trainee.names if name not in loaded | set(self.fresh)]
        if missing:
            raise ValueError(
                f"no file has weights of {missing[0]}, which is not trained in this run: give "
                "them with --from, or train it first"
            )
        if self.trainee.matcher is not None and "net1" not in self.fresh:
            self.trainee.matcher.unfold()
        self.start_schedule()
        self.open_pool(0)
        images = self.batch().images
        parts = [part for block in self.fresh for part in self.trainee.modules_of(block)]
        initialise_from_data(parts, lambda: self.trainee(images))
        for block in self.fresh:
            module = self.model.blocks[block]
            if isinstance(module, EncoderDecoder) and block not in ("net1", "sd"):
                carry_flow(module)
        self.start_stage()

    def wrap_model(self) -> None:
        trainee = Trainee(self.model, self.blocks).to(self.device)
        self.trainee = trainee.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def start_schedule(self) -> None:
        stages: tuple[Stage, ...] = FLOW if self.fresh else TUNING
        if "net1" in self.fresh and self.trainee.matcher:
            stages = MATCHING_FIRST
        self.schedule = Schedule(stages, self.arguments.minutes, self.arguments.steps)

    def start_stage(self) -> None:
        # Every worker has initialised its weights on different images.
        self.workers.share([parameter.data for parameter in self.trainee.parameters()])
        self.create_optimizer()

    def create_optimizer(self) -> None:
        """Create the optimizer and the running average of the trained weights."""
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
        self.average = AveragedModel(self.trainee, multi_avg_fn=update_average)
        self.stage_step = 0

    def state(self) -> dict[str, Any]:
        """Return the content of a checkpoint."""
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
                    "drawn": self.drawn,
                    "loaded": self.loaded,
                }
            ),
            "stage": self.schedule.stage_index,
            "stage_step": self.stage_step,
            "step": self.schedule.step,
            "elapsed": self.schedule.elapsed,
            "checked": self.checked,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Resume from the content of a checkpoint."""
        for name, saved, wanted in (
            ("--network", state["network"], self.model.network.name),
            ("--train", state["blocks"], self.blocks),
            ("--nproc-per-node", len(state["workers"]), self.workers.count),
        ):
            if saved != wanted:
                raise ValueError(
                    f"{self.out} holds a run of {name} {saved}: resume it with that, or choose "
                    "another --out"
                )
        self.fresh, self.source, self.checked = state["fresh"], state["source"], state["checked"]
        self.wrap_model()
        self.start_schedule()
        self.schedule.stage_index = state["stage"]
        self.schedule.step, self.schedule.elapsed = state["step"], state["elapsed"]
        self.create_optimizer()
        self.trainee.load_state_dict(state["trainee"])
        self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.stage_step = state["stage_step"]
        own = state["workers"][self.workers.rank]
        self.next_seed = own["seed"]
        self.drawn, self.loaded = own["drawn"], own["loaded"]
        self.open_pool(own["rendered"])
        self.pool.owed = own["owed"]
        self.random.set_state(own["random"])

    def save(self) -> None:
        """Write the checkpoint."""
        state = self.state()
        if self.workers.first:
            part = self.out / "checkpoint.new"
            torch.save(state, part)
            os.replace(part, self.checkpoint_file)

    # -- scenes -----------------------------------------------------------------------------

    def scaled(self, phase: Phase) -> tuple[tuple[int, int], int, float]:
        """Return crop, batch size and scale of the motions of a phase under --batch and --crop."""
        crop = self.arguments.crop or phase.crop
        displacement = phase.displacement * (SMALL_MOTIONS if "sd" in self.blocks else 1.0)
        return crop, max(1, round(phase.batch * self.arguments.batch / 8)), displacement

    def open_pool(self, rendered: int) -> None:
        """Open the scenes and the datasets' crops of the current phase."""
        self.pool_phase = self.schedule.phase
        crop, _, displacement = self.scaled(self.pool_phase)
        self.crops = load_crops(self.sources, crop, self.next_seed, self.loaded)
        self.pool = ScenePool(
            self.textures,
            self.arguments.pool if self.data_share < 1 else 0,
            crop,
            displacement,
            Mixture(
                self.arguments.small_motions,
                self.arguments.large_motions,
                self.arguments.driving,
            ),
            self.next_seed,
            rendered,
            self.device,
        )

    def batch(self) -> Batch:
        phase = self.schedule.phase
        if phase is not self.pool_phase:
            self.next_seed += self.pool.rendered
            self.open_pool(0)
        count = self.scaled(phase)[1]
        # Keep the datasets' share among all crops so far.
        before, after = (int(n * self.data_share) for n in (self.drawn, self.drawn + count))
        from_data = after - before
        crops = [next(self.crops).to(self.device) for _ in range(from_data)]
        if from_data < count:
            crops += self.pool.draw(count - from_data, self.arguments.reuse, self.random)
        self.drawn += count
        self.loaded += from_data
        return collate(crops, self.random)

    # -- training ---------------------------------------------------------------------------

    def run(self) -> None:
        """Train until the budget is used, with a checkpoint at every validation and at the end."""
        schedule = self.schedule
        started = time.monotonic() - schedule.elapsed
        logged = schedule.elapsed
        if schedule.step == 0 and not self.fresh:
            self.validate()
        while schedule.total_progress < 1.0:
            if schedule.stage_ends:
                self.start_flow_stage()
            self.log.append(self.train_step(time.monotonic() - started))
            ends = schedule.total_progress >= 1.0
            if ends or schedule.elapsed - logged > self.arguments.log_seconds:
                self.write_log()
                logged = schedule.elapsed
            if schedule.elapsed - self.checked > 60 * self.arguments.validate_minutes:
                self.checked = schedule.elapsed
                self.validate()
                self.save()
        self.validate()
        self.save()

    def start_flow_stage(self) -> None:
        """After the matching stage, keep its averaged weights and start to train flow."""
        self.trainee.load_state_dict(self.average.module.state_dict())
        self.schedule.stage_index += 1
        images = self.batch().images
        matcher = self.trainee.matcher
        assert matcher is not None
        matcher.fold_temperature()
        initialise_from_data(matcher.after_features(), lambda: self.trainee(images))
        self.start_stage()

    def train_step(self, elapsed: float) -> tuple[float, float]:
        """Make one step.

        Args:
            elapsed: seconds of the run on this worker; all workers use the mean.

        Returns:
            The loss, and the end-point error in pixels (in the matching stage the loss again).

        Raises:
            FloatingPointError: the loss is not finite.
        """
        batch = self.batch()
        schedule = self.schedule
        rate = schedule.learning_rate(self.arguments.learning_rate)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["factor"]
        matching = schedule.stage.matching
        with self.autocast():
            if matching:
                predictions, cost = [], self.trainee.cost(batch.images)
            else:
                predictions, cost = self.trainee(batch.images)
        loss = torch.zeros((), device=self.device)
        weight = 1.0 if matching else MATCHING_WEIGHT * max(0.0, 1 - 2 * schedule.progress)
        if cost is not None and "net1" in self.fresh and weight > 0:
            assert self.trainee.matcher is not None
            logits, no_match = self.trainee.matcher.logits(cost)
            loss = loss + weight * matching_loss(
                logits, batch.flow, batch.occluded, no_match, batch.valid
            )
        epe = loss.detach()
        for levels in predictions:
            loss = loss + multiscale_loss(
                levels,
                batch.flow,
                batch.valid,
                self.trainee.scale,
                LEVEL_WEIGHTS[self.arguments.level_weights],
                self.arguments.exponent,
                self.arguments.robust_levels,
            )
            finest = levels[-1].detach()
            epe = endpoint_error(finest * self.trainee.scale, batch.flow, batch.valid)
        values = torch.stack((loss.detach(), epe)).tolist()  # the step's only wait for a GPU
        if not math.isfinite(values[0]):  # a NaN flow crashes grid_sample's backward pass
            raise FloatingPointError(
                f"the loss of step {schedule.step} is {values[0]}: resume from the checkpoint "
                "with a lower --learning-rate"
            )
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        schedule.elapsed, mean_loss, mean_epe = self.workers.average_gradients(
            self.trainee, [elapsed, *values]
        )
        nn.utils.clip_grad_norm_(self.trainee.trained().values(), 1.0)
        self.optimizer.step()
        schedule.step += 1
        self.stage_step += 1
        if self.stage_step % AVERAGE_EVERY == 0:
            self.average.update_parameters(self.trainee)
        return mean_loss, mean_epe

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=not self.arguments.float32)

    # -- validation and log -----------------------------------------------------------------

    def predict(self, images: Tensor) -> Tensor:
        """Return the flow [H, W, 2] that the averaged weights predict, in pixels.

        Args:
            images: [2, 1, 3, H, W], BGR in 0..1, of any size.
        """
        height, width = images.shape[3:]
        sides = adapted(height), adapted(width)
        images = torch.stack([resample(image, *sides) for image in images.to(self.device)])
        with torch.no_grad(), self.autocast():
            predictions, _ = self.average(images)
        finest = predictions[-1][-1].float() * self.trainee.scale
        flow = resample(finest, height, width)[0].permute(1, 2, 0)
        return (flow * flow.new_tensor([width / sides[1], height / sides[0]])).cpu()

    def validate(self) -> None:
        """Append the errors on the validation pairs to `validation.csv`, and draw the curve."""
        schedule = self.schedule
        if schedule.stage.matching or not self.validation.families:
            return
        errors = self.validation.errors(self.predict)
        if not self.workers.first:
            return
        row = {"step": schedule.step, "seconds": round(schedule.elapsed, 1)}
        append_row(
            self.out / "validation.csv",
            row | {name: f"{error:.4f}" for name, error in errors.items()},
        )
        listed = ", ".join(f"{name} {error:.3f}" for name, error in errors.items())
        print(f"\nvalidation EPE {listed}", flush=True)
        plot(self.out)

    def write_log(self) -> None:
        """Append the means since the last call to `log.csv`, and print the progress."""
        loss, epe = (sum(values) / len(values) for values in zip(*self.log, strict=True))
        self.log = []
        if not self.workers.first:
            return
        schedule = self.schedule
        crop, batch, _ = self.scaled(schedule.phase)
        append_row(
            self.out / "log.csv",
            {
                "stage": "matching" if schedule.stage.matching else "flow",
                "step": schedule.step,
                "seconds": round(schedule.elapsed, 1),
                "height": crop[0],
                "width": crop[1],
                "batch": batch,
                "learning_rate": f"{self.optimizer.param_groups[0]['lr']:.3e}",
                "loss": f"{loss:.4f}",
                "epe": f"{epe:.4f}",
            },
        )
        error = "matching loss" if schedule.stage.matching else "EPE"
        print_progress(
            schedule.total_progress, schedule.elapsed, schedule.step, f"{error} {epe:.3f}"
        )


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
        help="initial weights; repeatable: the last file that has a sub-network is used",
    )
    parser.add_argument(
        "--train", nargs="+", metavar="BLOCK", help="net1, net2, … (default: the last)"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--textures", type=Path, help="folder of training.collect's output")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--batch", type=int, default=8, help="samples per process and step, at 192x256"
    )
    parser.add_argument("--learning-rate", type=float, default=4e-4, help="peak learning rate")
    parser.add_argument("--reuse", type=float, default=8.0, help="uses of each rendered scene")
    parser.add_argument("--pool", type=int, default=128, help="scenes kept for reuse")
    parser.add_argument(
        "--small-motions",
        type=float,
        default=0.0,
        help="share of scenes with a tenth of the motion",
    )
    parser.add_argument(
        "--large-motions",
        type=float,
        default=0.0,
        help="share of scenes with two to four times the motion",
    )
    parser.add_argument(
        "--driving",
        type=float,
        default=0.0,
        help="share of scenes seen by a camera that moves forward over a ground plane",
    )
    parser.add_argument("--level-weights", default="paper", choices=sorted(LEVEL_WEIGHTS))
    parser.add_argument(
        "--exponent",
        type=float,
        default=1.0,
        help="exponent of the error in the loss; 0.4 for small motions",
    )
    parser.add_argument(
        "--robust-levels",
        type=int,
        default=5,
        help="number of finest levels with that exponent; coarser levels have exponent 1",
    )
    parser.add_argument(
        "--validation", type=Path, help="folder of pairs (frame0.*, frame1.*, gt.flo or gt.png)"
    )
    parser.add_argument(
        "--data",
        nargs=2,
        action="append",
        default=[],
        metavar=("NAME", "DIR[:SHARE]"),
        help="a dataset with ground truth, and its share of the crops: one of "
        f"{', '.join(DATASETS)}; repeatable. Without a share, datasets replace the generated "
        "scenes",
    )
    parser.add_argument(
        "--holdout",
        type=float,
        default=0.1,
        help="share of the sequences of each dataset that is held out for validation",
    )
    parser.add_argument(
        "--validate-minutes", type=float, default=5.0, help="minutes between validations"
    )
    parser.add_argument("--log-seconds", type=float, default=20.0)
    parser.add_argument(
        "--crop", type=int, nargs=2, help="fixed crop height and width, multiples of 64"
    )
    parser.add_argument("--float32", action="store_true", help="train in float32, not bfloat16")
    arguments = parser.parse_args(argv)
    if arguments.device == "auto":
        arguments.device = "cuda" if torch.cuda.is_available() else "cpu"
    if arguments.crop:
        arguments.crop = tuple(arguments.crop)
    return arguments


def keep_memory() -> None:
    """Have glibc keep freed memory instead of returning it to the system after each large tensor.

    Page faults on fresh memory otherwise take most of a CPU step's time, above all in virtual
    machines. Does nothing if the C library has no `mallopt`.
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
    """Run the command line."""
    keep_memory()
    torch.backends.cudnn.benchmark = True  # sizes stay the same for thousands of steps
    try:
        trainer = Trainer(parse())
    except (Error, ValueError, OSError) as error:  # an invalid argument
        sys.exit(f"error: {error}")
    trainer.run()


if __name__ == "__main__":
    main()

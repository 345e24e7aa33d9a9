"""Stages, phases and learning rate of a training run, by the share of its budget that is used."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Phase:
    """Crop size, batch size and scale of the motions, from progress `start` of a stage onwards."""

    start: float
    crop: tuple[int, int]
    batch: int
    displacement: float


@dataclass(frozen=True)
class Stage:
    """A part of a run, `share` of the budget, with its own learning-rate schedule.

    In a `matching` stage only FlowNetC's features are trained, with the matching loss.
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


@dataclass
class Schedule:
    """The position of a run in its stages.

    Attributes:
        stages: the stages in order; their shares add up to one.
        minutes: the budget in minutes, unless `steps` is given.
        steps: the budget in steps.
        stage_index: index of the current stage.
        step: number of steps made.
        elapsed: seconds of training.
    """

    stages: tuple[Stage, ...]
    minutes: float
    steps: int | None
    stage_index: int = 0
    step: int = 0
    elapsed: float = 0.0

    @property
    def stage(self) -> Stage:
        return self.stages[self.stage_index]

    @property
    def total_progress(self) -> float:
        """Used share of the budget; 1 or more at its end."""
        return self.step / self.steps if self.steps else self.elapsed / (60.0 * self.minutes)

    @property
    def progress(self) -> float:
        """Progress of the current stage, 0 to 1."""
        before = sum(stage.share for stage in self.stages[: self.stage_index])
        return min(1.0, max(0.0, (self.total_progress - before) / self.stage.share))

    @property
    def phase(self) -> Phase:
        return [phase for phase in self.stage.phases if phase.start <= self.progress][-1]

    @property
    def stage_ends(self) -> bool:
        """True if the current stage has used its share and another stage follows."""
        return self.progress >= 1.0 and self.stage_index + 1 < len(self.stages)

    def learning_rate(self, peak: float) -> float:
        """Linear warm-up over the first 3 percent of a stage, then cosine decay to zero."""
        if self.progress < 0.03:
            return peak * (0.05 + 0.95 * self.progress / 0.03)
        return peak * 0.5 * (1 + math.cos(math.pi * (self.progress - 0.03) / 0.97))

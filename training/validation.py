"""End-point errors on pairs with ground truth, during training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from flownet2.evaluate import groups, motions
from flownet2.measures import end_point_error
from training.data import Source
from training.pairs import read_pairs, read_sample
from training.workers import Workers

SPEEDS = (10.0, 40.0, 100.0)
"""Lengths of true motion, in pixels, between the groups whose errors are reported."""


class Validation:
    """Validation pairs of a folder and held-out pairs of datasets, divided among the workers.

    Errors are reported by family of pairs (the mean over its pairs), and over the pixels of all
    pairs, by length of the true motion and for motion that ends inside and outside the image.
    """

    def __init__(self, folder: Path | None, sources: list[Source], workers: Workers) -> None:
        pairs = list(read_pairs(folder)) if folder else []
        pairs += [
            replace(read_sample(sample), name=source.name)
            for source in sources
            for sample in source.held_out
        ]
        self.families = sorted({pair.family for pair in pairs})
        self.pairs = pairs[workers.rank :: workers.count]
        self.workers = workers

    def errors(self, predict: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Return mean end-point errors in pixels by name; NaN for a name without pixels.

        Args:
            predict: the flow [H, W, 2] of images [2, 1, 3, H, W], BGR in 0..1.
        """
        kinds = [*motions(SPEEDS), "inside", "outside"]
        names = [*self.families, *kinds]
        sums = {name: [0.0, 0.0] for name in names}
        for pair in self.pairs:
            images = torch.from_numpy(np.stack(pair.frames)[..., ::-1].copy())
            images = images.permute(0, 3, 1, 2)[:, None].float() / 255
            error = end_point_error(predict(images).numpy(), pair.flow)
            sums[pair.family][0] += float(error[pair.valid].mean())
            sums[pair.family][1] += 1
            truth = np.where(pair.valid[..., None], pair.flow, np.float32(np.nan))
            masks = groups(truth, speeds=SPEEDS)
            for name in kinds:
                sums[name][0] += float(error[masks[name]].sum())
                sums[name][1] += int(masks[name].sum())
        flat = self.workers.average([value for both in sums.values() for value in both])
        return {
            name: total / count if count else float("nan")
            for name, total, count in zip(names, flat[::2], flat[1::2], strict=True)
        }

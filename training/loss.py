"""Losses: end-point error at every level, and feature matching between the frames."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from training.cost import RADIUS

# Weights of the mean errors of levels 6 to 2. The paper's weights are for sums over pixels; for
# means they are four times as large at each finer level. "finest" doubles from level to level, as
# the fine-tuning of PWC-Net and NVIDIA does.
LEVEL_WEIGHTS = {
    "paper": (0.32, 4 * 0.08, 16 * 0.02, 64 * 0.01, 256 * 0.005),
    "finest": (0.08, 0.16, 0.32, 0.64, 1.28),
}
STEP = 16.0  # pixels between neighbouring displacements of the correlation


def average_down(flow: Tensor, valid: Tensor, size: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Average the valid vectors of a flow over the cells of a coarser grid.

    Args:
        flow: [N, 2, H, W], zero where it is not valid.
        valid: bool [N, H, W].
        size: height and width of the grid.

    Returns:
        The flow [N, 2, h, w], and the cells with a valid vector, 1 or 0, as float32 [N, h, w].
    """
    share = F.adaptive_avg_pool2d(valid[:, None].float(), tuple(size))  # type: ignore[arg-type]
    total = F.adaptive_avg_pool2d(flow, tuple(size))  # type: ignore[arg-type]
    return total / share.clamp(min=1e-6), (share[:, 0] > 0).float()


def mean_over(error: Tensor, cells: Tensor) -> Tensor:
    """Return the mean of an error [N, h, w] over marked cells [N, h, w]; 0 if no cell is marked."""
    return (error * cells).sum() / cells.sum().clamp(min=1)


def endpoint_error(prediction: Tensor, flow: Tensor, valid: Tensor) -> Tensor:
    """Return the mean distance of a prediction [N, 2, h, w] from a finer flow [N, 2, H, W]."""
    truth, cells = average_down(flow, valid, prediction.shape[2:])
    return mean_over(torch.linalg.vector_norm(prediction.float() - truth, dim=1), cells)


def multiscale_loss(
    predictions: list[Tensor],
    flow: Tensor,
    valid: Tensor,
    scale: float,
    weights: Sequence[float] = LEVEL_WEIGHTS["paper"],
    exponent: float = 1.0,
    robust_levels: int = 5,
) -> Tensor:
    """Return the weighted end-point error over the levels of one network.

    Args:
        predictions: coarsest first, in units of `scale` pixels.
        flow: [N, 2, H, W] in pixels, zero where it is not `valid`; it is averaged down to the size
            of each level.
        valid: bool [N, H, W].
        scale: pixels in a unit of the predictions.
        weights: weights of the levels, coarsest first.
        exponent: exponent of the error at the `robust_levels` finest levels. Below 1 it gives small
            errors more weight, as the paper's fine-tuning for small displacements does.
        robust_levels: number of levels; coarser levels have exponent 1, so that large errors keep
            their weight at the levels that estimate large motions.
    """
    total = torch.zeros((), device=flow.device)
    plain_levels = len(predictions) - robust_levels
    for level, (weight, prediction) in enumerate(zip(weights, predictions, strict=True)):
        truth, cells = average_down(flow, valid, prediction.shape[2:])
        error = torch.linalg.vector_norm(prediction.float() - truth / scale, dim=1)
        if exponent != 1 and level >= plain_levels:
            error = (error + 0.01) ** exponent  # keeps the slope at zero finite
        total = total + weight * mean_over(error, cells)
    return total


def matching_loss(
    cost: Tensor, flow: Tensor, occluded: Tensor, no_match: Tensor, valid: Tensor
) -> Tensor:
    """Return the cross-entropy of the cost volume and the true match (InfoNCE, 441 displacements).

    The target of a visible cell is distributed bilinearly over the four displacements around the
    true displacement. The target of an occluded cell is "no match", which has a separate logit
    `no_match`. Cells that move beyond the volume and cells without a valid vector are ignored.
    `cost` [N, 441, h, w] holds logits; `flow` [N, 2, 8h, 8w] in pixels; `occluded` and `valid` [N,
    8h, 8w].
    """
    count, _, height, width = cost.shape
    logits = cost.float().permute(0, 2, 3, 1).reshape(-1, cost.shape[1])
    logits = torch.cat([logits, no_match.float().expand(len(logits), 1)], 1)
    log_probability = F.log_softmax(logits, dim=1)
    # Cell i of the third convolution is centred on pixel 8 i.
    position = flow[:, :, ::8, ::8] / STEP + RADIUS
    x, y = position[:, 0].flatten(), position[:, 1].flatten()
    side = 2 * RADIUS + 1
    within = (x >= 0) & (y >= 0) & (x <= side - 1) & (y <= side - 1)
    left, top = x.floor().clamp(0, side - 2), y.floor().clamp(0, side - 2)
    loss = torch.zeros(count * height * width, device=cost.device)
    for dy in (0, 1):
        for dx in (0, 1):
            weight = (1 - (x - left - dx).abs()) * (1 - (y - top - dy).abs())
            index = ((top + dy) * side + left + dx).long()
            loss = loss - weight * log_probability.gather(1, index[:, None])[:, 0]
    hidden = occluded[:, ::8, ::8].flatten()
    loss = torch.where(hidden, -log_probability[:, -1], loss)
    counted = ((within | hidden) & valid[:, ::8, ::8].flatten()).float()
    return (loss * counted).sum() / counted.sum().clamp(min=1)

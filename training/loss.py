"""Losses: end-point error at every level, and matching of features across the pair."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from training.cost import RADIUS

# The paper's weights of sums over pixels, coarsest level first; a mean over pixels weighs four
# times as much on each finer level, which LEVEL_WEIGHTS accounts for.
SUM_WEIGHTS = (0.32, 0.08, 0.02, 0.01, 0.005)
LEVEL_WEIGHTS = tuple(weight * 4**level for level, weight in enumerate(SUM_WEIGHTS))
STEP = 16.0  # pixels between neighbouring displacements of the correlation


def endpoint_error(prediction: Tensor, flow: Tensor) -> Tensor:
    """Mean Euclidean distance of two flows [N, 2, H, W]."""
    error: Tensor = torch.linalg.vector_norm(prediction.float() - flow, dim=1)
    return error.mean()


def multiscale_loss(predictions: list[Tensor], flow: Tensor, scale: float) -> Tensor:
    """Weighted end-point error over the levels of one network.

    `predictions` coarsest first, in units of `scale` pixels; `flow` [N, 2, H, W] in pixels is
    averaged down to each.
    """
    total = torch.zeros((), device=flow.device)
    for weight, prediction in zip(LEVEL_WEIGHTS, predictions, strict=True):
        truth = F.adaptive_avg_pool2d(flow, prediction.shape[2:]) / scale  # type: ignore[arg-type]
        total = total + weight * endpoint_error(prediction, truth)
    return total


def matching_loss(cost: Tensor, flow: Tensor, occluded: Tensor, nothing: Tensor) -> Tensor:
    """Cross-entropy of the cost volume against the true match (InfoNCE over 441 displacements).

    The target of a visible cell is spread bilinearly over the four displacements around the true
    one, that of an occluded cell is "no match", a logit `nothing` of its own; cells that move
    beyond the volume do not count. `cost` [N, 441, h, w] holds logits; `flow` [N, 2, 8h, 8w] in
    pixels; `occluded` [N, 8h, 8w].
    """
    count, _, height, width = cost.shape
    logits = cost.float().permute(0, 2, 3, 1).reshape(-1, cost.shape[1])
    logits = torch.cat([logits, nothing.float().expand(len(logits), 1)], 1)
    log_probability = F.log_softmax(logits, dim=1)
    # Cell i of the third convolution is centred on pixel 8 i.
    place = flow[:, :, ::8, ::8] / STEP + RADIUS
    x, y = place[:, 0].flatten(), place[:, 1].flatten()
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
    counted = (within | hidden).float()
    return (loss * counted).sum() / counted.sum().clamp(min=1)

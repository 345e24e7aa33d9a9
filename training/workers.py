"""Data-parallel training in several processes on one machine; gradients are averaged every step.

On a shared CPU, several single-threaded processes are several times faster than one process with
several threads, in which every operation waits for the slowest thread.
"""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


class Workers:
    """The workers that `torchrun` started; in a single process every method does nothing."""

    def __init__(self) -> None:
        self.count = int(os.environ.get("WORLD_SIZE", "1"))
        self.rank = int(os.environ.get("RANK", "0"))
        if self.count > 1 and not dist.is_initialized():
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
            dist.init_process_group("gloo")

    @property
    def first(self) -> bool:
        return self.rank == 0

    def average_gradients(self, module: nn.Module, extra: list[float]) -> list[float]:
        """Average the gradients of `module` over all workers, and the numbers in `extra`."""
        if self.count == 1:
            return extra
        gradients = [p.grad for p in module.parameters() if p.grad is not None]
        flat = torch.cat([*(g.reshape(-1) for g in gradients), gradients[0].new_tensor(extra)])
        dist.all_reduce(flat)
        flat /= self.count
        offset = 0
        for gradient in gradients:
            gradient.copy_(flat[offset : offset + gradient.numel()].view(gradient.shape))
            offset += gradient.numel()
        return [float(value) for value in flat[offset:]]

    def average(self, values: list[float]) -> list[float]:
        if self.count == 1:
            return values
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor)
        return [float(value) for value in tensor / self.count]

    def gather(self, value: dict[str, Any]) -> list[dict[str, Any]]:
        """Return the `value` of each worker, by rank."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        dist.all_gather_object(values, value)
        return values

    def share(self, tensors: list[Tensor]) -> None:
        """Copy the `tensors` of the first worker to all others."""
        if self.count > 1:
            for tensor in tensors:
                dist.broadcast(tensor, 0)

"""Test cases of the correlation, and the brute-force reference, for every implementation.

Read by the tests, and by ``python -m benchmarks.correlation`` on a machine with a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


@dataclass(frozen=True)
class Case:
    """One call of the op: the shape of `a` and `b` as (N, C, H, W), and the attributes."""

    name: str
    shape: tuple[int, int, int, int]
    pad: int = 20
    kernel_size: int = 1
    max_displacement: int = 20
    stride1: int = 1
    stride2: int = 2

    @property
    def attributes(self) -> dict[str, int]:
        """Return the op's integer attributes by name."""
        return {
            "pad": self.pad,
            "kernel_size": self.kernel_size,
            "max_displacement": self.max_displacement,
            "stride1": self.stride1,
            "stride2": self.stride2,
        }

    @property
    def output_shape(self) -> tuple[int, int, int, int]:
        """Return (N, D * D, H', W') with D = 2 * (max_displacement // stride2) + 1."""
        n, _, height, width = self.shape
        displacements = 2 * (self.max_displacement // self.stride2) + 1
        border = 2 * (self.max_displacement + self.kernel_size // 2)
        rows, columns = (
            -(-(size + 2 * self.pad - border) // self.stride1) for size in (height, width)
        )
        return n, displacements**2, rows, columns

    def inputs(self, dtype: type[np.floating[Any]] = np.float32) -> tuple[Array, Array]:
        """Return `a` and `b` of `dtype`: normally distributed, the same for the same case."""
        rng = np.random.default_rng(sum(self.shape))
        a, b = rng.standard_normal((2, *self.shape), dtype=np.float32).astype(dtype)
        return a, b


# FlowNet's attributes, with sizes below, at and above the kernel's tiles (16 and 32 columns; 4 and
# 8 rows; 16 channels), also odd ones.
FLOWNET_CASES = (
    Case("flownet", (1, 32, 16, 32)),
    Case("flownet, two tiles each way", (2, 16, 24, 64)),
    Case("flownet, one past the tile", (1, 17, 9, 65)),
    Case("flownet, one short of the tile", (1, 15, 7, 31)),
    Case("flownet, odd everywhere", (3, 5, 13, 37)),
    Case("flownet, columns by four", (1, 8, 5, 36)),
    Case("flownet, smaller than the window", (2, 3, 3, 2)),
    Case("flownet, one pixel, one channel", (1, 1, 1, 1)),
)
GENERAL_CASES = (
    Case("every displacement", (1, 6, 9, 11), pad=3, max_displacement=3, stride2=1),
    Case("kernel 3", (2, 5, 10, 12), pad=4, kernel_size=3, max_displacement=3, stride2=1),
    Case("kernel 3, stride1 2", (1, 7, 13, 18), 4, 3, 4, 2, 2),
    Case("kernel 5, stride1 3", (1, 3, 17, 16), 6, 5, 4, 3, 2),
    Case("stride1 2", (1, 9, 15, 17), 4, 1, 4, 2, 2),
    Case("stride1 2, odd stride2", (2, 4, 14, 33), 6, 1, 6, 2, 3),
    Case("stride1 3 over stride2 2", (1, 4, 21, 20), 6, 1, 6, 3, 2),
    Case("pad below max_displacement", (1, 6, 20, 22), pad=2, max_displacement=6),
    Case("pad above max_displacement", (1, 6, 8, 10), pad=9, max_displacement=4),
    Case("no pad", (1, 33, 48, 50), pad=0),
    Case("flownet, other pad", (1, 4, 12, 30), pad=22),
    Case("stride2 leaves a rest", (1, 4, 12, 14), pad=5, max_displacement=5),
    Case("no displacement", (2, 10, 6, 7), pad=0, max_displacement=0, stride2=1),
    Case("stride2 over max_displacement", (1, 3, 6, 7), pad=1, max_displacement=1, stride2=2),
    Case("one output pixel", (1, 4, 1, 1), pad=2, max_displacement=2, stride2=1),
)
CASES = FLOWNET_CASES + GENERAL_CASES

# FlowNet2's sizes at 512x512 and at 1024x2048: too large for NumPy in a test suite.
TIMED_CASES = (
    Case("256x64x64", (1, 256, 64, 64)),
    Case("256x128x256", (1, 256, 128, 256)),
)

# Attributes that every implementation rejects, each with a word of the error message.
REFUSED_CASES = (
    (Case("even kernel", (1, 2, 8, 8), 4, 2, 4, 1, 1), "kernel_size"),
    (Case("kernel 0", (1, 2, 8, 8), 4, 0, 4, 1, 1), "kernel_size"),
    (Case("negative pad", (1, 2, 8, 8), -1, 1, 1, 1, 1), "pad"),
    (Case("negative displacement", (1, 2, 8, 8), 4, 1, -1, 1, 1), "max_displacement"),
    (Case("stride1 0", (1, 2, 8, 8), 4, 1, 4, 0, 1), "stride1"),
    (Case("stride2 0", (1, 2, 8, 8), 4, 1, 4, 1, 0), "stride2"),
    (Case("nothing left", (1, 2, 8, 8), 0, 1, 4, 1, 1), "smaller than"),
)


def brute_force(case: Case, a: Array, b: Array) -> NDArray[np.float64]:
    """Compute the op by its definition (FlowNet2's Caffe `Correlation` layer) in float64.

    Each displacement and kernel position is computed separately, as the mean of a product.
    """
    pad = ((0, 0), (0, 0), (case.pad, case.pad), (case.pad, case.pad))
    a, b = (np.pad(maps.astype(np.float64), pad) for maps in (a, b))
    _, _, rows, columns = case.output_shape
    radius = case.max_displacement // case.stride2
    offsets = [step * case.stride2 for step in range(-radius, radius + 1)]

    def patch(maps: Array, top: int, left: int) -> Array:
        bottom = top + (rows - 1) * case.stride1 + 1
        right = left + (columns - 1) * case.stride1 + 1
        return maps[:, :, top : bottom : case.stride1, left : right : case.stride1]

    output = np.zeros(case.output_shape)
    for channel, (dy, dx) in enumerate((dy, dx) for dy in offsets for dx in offsets):
        for j in range(case.kernel_size):
            for i in range(case.kernel_size):
                y, x = case.max_displacement + j, case.max_displacement + i
                product = patch(a, y, x) * patch(b, y + dy, x + dx)
                output[:, channel] += product.sum(axis=1)
    output /= case.kernel_size**2 * case.shape[1]
    return output


def tolerance(dtype: type[np.floating[Any]]) -> dict[str, float]:
    """Return `rtol` and `atol` against `brute_force` of inputs that were rounded to `dtype` first.

    Sums are in float32 everywhere, so half precision only adds the rounding of the result.
    """
    if dtype is np.float16:
        return {"rtol": 2.0**-10, "atol": 2e-5}
    return {"rtol": 1e-5, "atol": 3e-6}

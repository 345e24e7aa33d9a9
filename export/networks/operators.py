"""Operators of the FlowNet2 networks other than convolutions, with Caffe's semantics.

Features and images are ``[N, C, H, W]``. Flow is ``[N, 2, H, W]``, u (to the right) before v
(down), in pixels of the tensor it belongs to.
"""

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@torch.library.custom_op("flownet2::correlation", mutates_args=())
def correlation(
    a: Tensor,
    b: Tensor,
    pad: int,
    kernel_size: int,
    max_displacement: int,
    stride1: int,
    stride2: int,
) -> Tensor:
    """Compute the cost volume of two feature maps (Caffe layer ``Correlation``; FlowNet, sec. 3).

    Channel ``(dy_index * D + dx_index)`` with ``D = 2 * (max_displacement // stride2) + 1`` holds
    the mean over channels and kernel window of ``a(y, x) * b(y + dy, x + dx)``, zero outside.

    ``correlation.register_kernel("cuda", kernel)`` replaces the implementation on a device.

    Args:
        a, b: ``[N, C, H, W]`` of one shape.
        kernel_size: odd side of the window.

    Returns:
        ``[N, D * D, H', W']`` with
        ``H' = ceil((H + 2 pad - 2 (max_displacement + kernel_size // 2)) / stride1)``.
    """
    return banded_correlation(a, b, pad, kernel_size, max_displacement, stride1, stride2)


@correlation.register_fake
def _shape(
    a: Tensor,
    b: Tensor,
    pad: int,
    kernel_size: int,
    max_displacement: int,
    stride1: int,
    stride2: int,
) -> Tensor:
    border = 2 * (max_displacement + kernel_size // 2 - pad)
    rows, columns = ((side - border + stride1 - 1) // stride1 for side in a.shape[2:])
    return a.new_empty((a.shape[0], (2 * (max_displacement // stride2) + 1) ** 2, rows, columns))


def _keep_arguments(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])
    ctx.attributes = inputs[2:]


def _gradients(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    features = [x.detach().requires_grad_() for x in ctx.saved_tensors]
    with torch.enable_grad():
        volume = banded_correlation(*features, *ctx.attributes)
    return (*torch.autograd.grad(volume, features, gradient), *(None for _ in ctx.attributes))


correlation.register_autograd(_gradients, setup_context=_keep_arguments)


def banded_correlation(
    a: Tensor,
    b: Tensor,
    pad: int,
    kernel_size: int,
    max_displacement: int,
    stride1: int,
    stride2: int,
) -> Tensor:
    """Compute :func:`correlation` in standard operators: one batched matrix product for each dy.

    Each product compares every column of a row with every column of another row. The diagonals
    within the maximum displacement form the cost volume; a reshape extracts them. (441 shifted
    products, or one product over all pairs of positions, take several times as long.)
    """
    height, width = a.shape[2:]
    radius = max_displacement // stride2
    # The window of `a` covers the padded map without the border that displacements reach; `b`
    # keeps that border. `reach` handles a max_displacement that stride2 does not divide.
    reach = radius * stride2
    border = pad - max_displacement
    # Scale both factors, so that half precision neither overflows nor underflows.
    scale = a.shape[1] ** -0.5
    a = F.pad(a * scale, (border,) * 4)
    b = F.pad(b * scale, (border + reach,) * 4)
    rows, columns = height + 2 * border, width + 2 * border

    # Columns are only compared with columns of the same residue modulo stride2, so these are
    # grouped; the row products below then compute few unneeded pairs.
    groups = (columns + stride2 - 1) // stride2
    missing = groups * stride2 - columns
    a = F.pad(a, (0, missing)).unflatten(3, (groups, stride2)).permute(0, 2, 4, 3, 1)
    b = F.pad(b, (0, missing)).unflatten(3, (groups + 2 * radius, stride2)).permute(0, 2, 4, 1, 3)
    bands = []
    for dy in range(2 * radius + 1):
        # [N, rows, stride2, groups, groups + 2 radius]
        product = a @ b.narrow(1, dy * stride2, rows)
        # [N, dx, rows, groups, stride2]; a transpose for each dy takes a fifth of the time of one
        # transpose of all.
        bands.append(_band(product, 2 * radius + 1).permute(0, 4, 1, 3, 2))
    # [N, dy * dx, rows, columns]
    volume = torch.cat(bands, dim=1).flatten(3).narrow(3, 0, columns)
    if kernel_size > 1:
        return F.avg_pool2d(volume, kernel_size, stride=stride1)
    return volume[:, :, ::stride1, ::stride1]


def _band(product: Tensor, width: int) -> Tensor:
    """Return diagonals 0..width-1 of ``[..., n, n + width - 1]`` as ``[..., n, width]``.

    Padding each row by one element shifts row i by i places: a reshape instead of a gather.
    """
    n, m = product.shape[-2:]
    skewed = F.pad(product.flatten(-2), (0, n)).unflatten(-1, (n, m + 1))
    band: Tensor = skewed.narrow(-1, 0, width)
    return band


def warp(image: Tensor, flow: Tensor, edge: bool = False) -> Tensor:
    """Warp the second image onto the first by the flow (Caffe layer ``FlowWarp``).

    Bilinear. A source point left of 0 or at ``width`` and beyond (likewise vertically) gives zero;
    inside, the right and lower neighbours are clamped to the last column and row.

    Args:
        image: ``[N, C, H, W]``.
        flow: ``[N, 2, H, W]``.
        edge: clamp source points outside the image to its edge instead.
    """
    height, width = image.shape[2:]
    x = flow[:, 0] + torch.arange(width, device=flow.device, dtype=flow.dtype)
    y = flow[:, 1] + torch.arange(height, device=flow.device, dtype=flow.dtype)[:, None]
    inside = (x >= 0) & (y >= 0) & (x < width) & (y < height)
    # Border padding in grid_sample clamps the coordinate itself, which between the last column and
    # the image's edge equals clamping the neighbour.
    # Stacked as planes and transposed: OpenVINO takes five times as long to interleave them.
    grid = torch.stack((2 * x / (width - 1) - 1, 2 * y / (height - 1) - 1), dim=1)
    grid = grid.permute(0, 2, 3, 1)
    sampled = F.grid_sample(image, grid, mode="bilinear", padding_mode="border", align_corners=True)
    return sampled if edge else sampled * inside[:, None].to(image.dtype)


def channel_norm(x: Tensor) -> Tensor:
    """Return the L2 norm over channels, ``[N, 1, H, W]`` (Caffe layer ``ChannelNorm``)."""
    norm: Tensor = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    return norm


def resample(x: Tensor, height: int, width: int, shrink: int = 1) -> Tensor:
    """Resize to `height` x `width` as Caffe's layer ``Resample`` does (LINEAR, antialias on).

    An output is the mean of the inputs around its position, weighted by a triangle as wide as a
    pixel of the input, or of the output if the image shrinks. As in Caffe, the half-pixel offset of
    each axis uses the factor of the other axis. The arithmetic is float32.

    Args:
        x: ``[N, C, H, W]``.
        shrink: largest factor by which an axis shrinks, rounded up; 1 if both grow.
    """
    rows, columns = (
        torch.tensor(old / new, device=x.device)
        for old, new in ((x.shape[2], height), (x.shape[3], width))
    )
    widened = torch.maximum(rows, columns) > 1
    for axis, size, factor, other in ((2, height, rows, columns), (3, width, columns, rows)):
        radius = torch.where(widened, factor, 1.0)
        centre = torch.arange(size, device=x.device) * factor + (other / 2 - 0.5)
        # Indices of all inputs nearer than the radius, [taps, size].
        taps = torch.arange(1, 2 * shrink + 1, device=x.device)
        index = torch.floor(centre - radius) + taps[:, None]
        inside = (index >= 0) & (index < x.shape[axis])
        weight = F.relu(1 - (index - centre).abs() / radius) * inside
        weight = weight / weight.sum(dim=0).clamp(min=1e-30)
        if axis == 2:
            weight = weight[:, :, None]
        index = index.clamp(0, x.shape[axis] - 1).long()
        # A gather and a product for each tap are many times faster than one matrix product.
        terms = [x.index_select(axis, i) * w for i, w in zip(index, weight, strict=True)]
        x = functools.reduce(torch.add, terms)
    return x


def upsample_aligned(x: Tensor) -> Tensor:
    """Upsample by four, bilinear with aligned corners (Caffe layer ``Accum``)."""
    size = (4 * x.shape[2], 4 * x.shape[3])
    return F.interpolate(x, size=size, mode="bilinear", align_corners=True)


def upsample_unaligned(x: Tensor) -> Tensor:
    """Upsample by four, bilinear with half-pixel centres."""
    return F.interpolate(x, scale_factor=4.0, mode="bilinear", align_corners=False)


def upsample_nearest(x: Tensor) -> Tensor:
    """Upsample by four, nearest (Caffe layer ``Resample``, NEAREST)."""
    return F.interpolate(x, scale_factor=4.0, mode="nearest")

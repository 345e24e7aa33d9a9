"""The operators of the FlowNet2 networks that are not plain convolutions, with Caffe's semantics.

Shapes are PyTorch's: features and images ``[N, C, H, W]``, flow ``[N, 2, H, W]`` with u (to the
right) before v (down), in pixels of the tensor it goes with.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def correlation(
    a: Tensor,
    b: Tensor,
    pad: int = 20,
    kernel_size: int = 1,
    max_displacement: int = 20,
    stride1: int = 1,
    stride2: int = 2,
) -> Tensor:
    """Cost volume of two feature maps (Caffe layer ``Correlation``; FlowNet, section 3).

    Channel ``(dy_index * D + dx_index)`` with ``D = 2 * (max_displacement // stride2) + 1`` holds
    the mean over channels and kernel window of ``a(y, x) * b(y + dy, x + dx)``, zero outside.

    Args:
        a, b: ``[N, C, H, W]`` of one shape.
        kernel_size: odd side of the window.

    Returns:
        ``[N, D * D, H', W']`` with
        ``H' = ceil((H + 2 pad - 2 (max_displacement + kernel_size // 2)) / stride1)``.
    """
    height, width = a.shape[2:]
    if torch.compiler.is_exporting():  # the node of our own op, in place of the arithmetic below
        shrink = 2 * (max_displacement + kernel_size // 2 - pad)
        return torch.onnx.ops.symbolic(
            "flownet2::Correlation",
            (a, b),
            {
                "pad": pad,
                "kernel_size": kernel_size,
                "max_displacement": max_displacement,
                "stride1": stride1,
                "stride2": stride2,
                "plugin_version": "1",
                "plugin_namespace": "flownet2",
            },
            dtype=a.dtype,
            shape=(
                a.shape[0],
                (2 * (max_displacement // stride2) + 1) ** 2,
                (height - shrink + stride1 - 1) // stride1,
                (width - shrink + stride1 - 1) // stride1,
            ),
            version=1,
        )
    return banded_correlation(a, b, pad, kernel_size, max_displacement, stride1, stride2)


def banded_correlation(
    a: Tensor,
    b: Tensor,
    pad: int,
    kernel_size: int,
    max_displacement: int,
    stride1: int,
    stride2: int,
) -> Tensor:
    """:func:`correlation` in standard operators: one batched matrix product for each dy.

    A product compares every column of a row with every column; the diagonals within reach are the
    cost volume, cut out by a reshape. (441 shifted products, or one product over all pairs of
    positions, take several times as long.)
    """
    height, width = a.shape[2:]
    radius = max_displacement // stride2
    # The window of `a` runs over the padded map less the border that displacements may reach;
    # `b` keeps that border (`reach` covers a max_displacement that stride2 does not divide).
    reach = radius * stride2
    border = pad - max_displacement
    scale = a.shape[1] ** -0.5  # on both sides, so that half precision neither over- nor underflows
    a = F.pad(a * scale, (border,) * 4)
    b = F.pad(b * scale, (border + reach,) * 4)
    rows, columns = height + 2 * border, width + 2 * border

    # Columns of one residue modulo stride2 only ever meet columns of the same residue, so they are
    # laid side by side; the row products below then compute few pairs that nobody asked for.
    groups = (columns + stride2 - 1) // stride2
    missing = groups * stride2 - columns
    a = F.pad(a, (0, missing)).unflatten(3, (groups, stride2)).permute(0, 2, 4, 3, 1)
    b = F.pad(b, (0, missing)).unflatten(3, (groups + 2 * radius, stride2)).permute(0, 2, 4, 1, 3)
    bands = []
    for dy in range(2 * radius + 1):
        # [N, rows, stride2, groups, groups + 2 radius]
        product = a @ b.narrow(1, dy * stride2, rows)
        bands.append(_band(product, 2 * radius + 1))
    # [N, rows, stride2, groups, dy, dx] -> [N, dy * dx, rows, columns]
    volume = torch.stack(bands, dim=4).permute(0, 4, 5, 1, 3, 2)
    volume = volume.flatten(4).narrow(4, 0, columns).flatten(1, 2)
    if kernel_size > 1:
        return F.avg_pool2d(volume, kernel_size, stride=stride1)
    return volume[:, :, ::stride1, ::stride1]


def _band(product: Tensor, width: int) -> Tensor:
    """Diagonals 0..width-1 of ``[..., n, n + width - 1]`` as ``[..., n, width]``.

    One element more a row shifts row i by i places: a reshape instead of a gather.
    """
    n, m = product.shape[-2:]
    skewed = F.pad(product.flatten(-2), (0, n)).unflatten(-1, (n, m + 1))
    band: Tensor = skewed.narrow(-1, 0, width)
    return band


def warp(image: Tensor, flow: Tensor) -> Tensor:
    """Bring the second image onto the first by the flow (Caffe layer ``FlowWarp``).

    Bilinear; a source point left of 0 or at ``width`` and beyond (likewise vertically) gives zero;
    inside, the right and lower neighbours are clamped to the last column and row.

    Args:
        image: ``[N, C, H, W]``. flow: ``[N, 2, H, W]``.
    """
    height, width = image.shape[2:]
    x = flow[:, 0] + torch.arange(width, device=flow.device, dtype=flow.dtype)
    y = flow[:, 1] + torch.arange(height, device=flow.device, dtype=flow.dtype)[:, None]
    inside = (x >= 0) & (y >= 0) & (x < width) & (y < height)
    # Border padding in grid_sample clamps the coordinate itself, which between the last column and
    # the image's edge gives what clamping the neighbour gives.
    grid = torch.stack((2 * x / (width - 1) - 1, 2 * y / (height - 1) - 1), dim=-1)
    sampled = F.grid_sample(image, grid, mode="bilinear", padding_mode="border", align_corners=True)
    return sampled * inside[:, None].to(image.dtype)


def channel_norm(x: Tensor) -> Tensor:
    """L2 norm over channels, ``[N, C, H, W]`` to ``[N, 1, H, W]`` (Caffe layer ``ChannelNorm``)."""
    return x.square().sum(dim=1, keepdim=True).sqrt()


def resample(x: Tensor, height: int, width: int) -> Tensor:
    """Bilinear resize with half-pixel centres (Caffe layer ``Resample``, LINEAR).

    That layer also swaps the axes' scales in its half-pixel offset and smooths where it shrinks;
    neither is followed here, and neither shows at multiples of 64.
    """
    return F.interpolate(x, size=(height, width), mode="bilinear", align_corners=False)


def upsample_aligned(x: Tensor) -> Tensor:
    """Four times as high and wide, bilinear with corners aligned (Caffe layer ``Accum``)."""
    size = (4 * x.shape[2], 4 * x.shape[3])
    return F.interpolate(x, size=size, mode="bilinear", align_corners=True)


def upsample_nearest(x: Tensor) -> Tensor:
    """Four times as high and wide, nearest (Caffe layer ``Resample``, NEAREST)."""
    return F.interpolate(x, scale_factor=4.0, mode="nearest")

"""The operators of the FlowNet2 networks that are not plain convolutions, with Caffe's semantics.

Shapes are PyTorch's: features and images ``[N, C, H, W]``, flow ``[N, 2, H, W]`` with u (to the
right) before v (down), in pixels of the tensor it goes with.
"""

import math

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
    if torch.compiler.is_exporting():
        exported: Tensor = torch.ops.flownet2.correlation(
            a, b, pad, kernel_size, max_displacement, stride1, stride2
        )
        return exported
    height, width = a.shape[2:]
    channels = a.shape[1]
    radius = max_displacement // stride2
    # The window of `a` runs over the padded map less the border that displacements may reach;
    # `b` gets that border too (`reach` covers a max_displacement that stride2 does not divide).
    reach = radius * stride2
    border = pad - max_displacement
    a = F.pad(a, (border,) * 4)
    b = F.pad(b, (border + reach,) * 4)
    rows, columns = height + 2 * border, width + 2 * border

    # Columns of one residue modulo stride2 only ever meet columns of the same residue, so they are
    # laid side by side; the row products below then compute few pairs that nobody asked for.
    groups = math.ceil(columns / stride2)
    missing = groups * stride2 - columns
    a = F.pad(a, (0, missing)).unflatten(3, (groups, stride2)).permute(0, 2, 4, 3, 1)
    b = F.pad(b, (0, missing)).unflatten(3, (groups + 2 * radius, stride2)).permute(0, 2, 4, 1, 3)
    bands = []
    for dy in range(2 * radius + 1):
        first = dy * stride2
        product = a @ b[:, first : first + rows]  # [N, rows, stride2, groups, groups + 2 radius]
        bands.append(_band(product, 2 * radius + 1))
    # [N, rows, stride2, groups, dy, dx] -> [N, dy * dx, rows, columns]
    volume = torch.stack(bands, dim=4).permute(0, 4, 5, 1, 3, 2) / channels
    volume = volume.flatten(4)[..., :columns].flatten(1, 2)
    if kernel_size > 1:
        volume = F.avg_pool2d(volume, kernel_size, stride=stride1)
        # Caffe counts windows with ceil, which for a window that fits is what avg_pool2d counts.
        return volume
    return volume[:, :, ::stride1, ::stride1]


def _band(product: Tensor, width: int) -> Tensor:
    """Diagonals 0..width-1 of ``[..., n, n + width - 1]`` as ``[..., n, width]``.

    One element more a row shifts row i by i places: a reshape instead of a gather.
    """
    n, m = product.shape[-2:]
    skewed = F.pad(product.flatten(-2), (0, n)).unflatten(-1, (n, m + 1))
    return skewed[..., :width]


@torch.library.custom_op("flownet2::correlation", mutates_args=())
def _correlation_op(
    a: Tensor,
    b: Tensor,
    pad: int,
    kernel_size: int,
    max_displacement: int,
    stride1: int,
    stride2: int,
) -> Tensor:
    """The node that an exported graph holds in place of the arithmetic above."""
    return correlation(a, b, pad, kernel_size, max_displacement, stride1, stride2).contiguous()


@_correlation_op.register_fake
def _(
    a: Tensor,
    b: Tensor,
    pad: int,
    kernel_size: int,
    max_displacement: int,
    stride1: int,
    stride2: int,
) -> Tensor:
    border = pad - max_displacement - kernel_size // 2
    displacements = (2 * (max_displacement // stride2) + 1) ** 2
    height, width = ((s + 2 * border + stride1 - 1) // stride1 for s in a.shape[2:])
    return a.new_empty(a.shape[0], displacements, height, width)


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
    """Bilinear resize with half-pixel centres (Caffe layer ``Resample``, LINEAR)."""
    return F.interpolate(x, size=(height, width), mode="bilinear", align_corners=False)


def upsample_aligned(x: Tensor) -> Tensor:
    """Four times as high and wide, bilinear with corners aligned (Caffe layer ``Accum``)."""
    size = (4 * x.shape[2], 4 * x.shape[3])
    return F.interpolate(x, size=size, mode="bilinear", align_corners=True)


def upsample_nearest(x: Tensor) -> Tensor:
    """Four times as high and wide, nearest (Caffe layer ``Resample``, NEAREST)."""
    return F.interpolate(x, scale_factor=4.0, mode="nearest")

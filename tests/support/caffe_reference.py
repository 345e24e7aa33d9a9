"""Independent implementation of the Caffe networks, by Caffe's layer names.

It uses no code of export/: it has its own table of layers, and the custom layers are in NumPy.
Weights are a dict from Caffe layer name to (weight, bias), as a ``.caffemodel.h5`` stores them.
:class:`Options` describes the differences of other projects from Caffe.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

Array = NDArray[Any]
Blobs = dict[str, list[Array]]


@dataclass
class Options:
    """Differences of a project from Caffe.

    Attributes:
        mean: the mean that is subtracted: "stored" in the blobs, of the "pair", of each "image", or
            given as three numbers in the channel order of the network.
        unit, sd_unit: pixels in a unit of the predictions.
    """

    rgb: bool = False
    mean: str | tuple[float, float, float] = "stored"
    summed: bool = False
    unit: float = 20
    sd_unit: float = 0.05
    edge: bool = False
    aligned: bool = True
    resized: bool = True


CAFFE = Options()

TAIL = [("conv4", 512), ("conv4_1", 512), ("conv5", 512), ("conv5_1", 512), ("conv6", 1024),
        ("conv6_1", 1024)]  # fmt: skip
FUSION = [("conv0", 64), ("conv1", 64), ("conv1_1", 128), ("conv2", 128), ("conv2_1", 128)]
TWICE = {"net2_": "net2_", "net3_": "net3_"}


def _prediction(prefix: str, start: str, level: int) -> str:
    if prefix in TWICE:
        return f"{prefix}predict_conv{level}"
    if start == "s-thin":
        return f"predict_conv{level}"
    return f"{prefix}{'_' if prefix == 'fuse_' else ''}Convolution{7 - level}"


def _upflow(prefix: str, level: int) -> str:
    return f"{prefix}{TWICE.get(prefix, '')}upsample_flow{level}to{level - 1}"


def make_blobs(nets: list[str], width: float, seed: int = 0) -> Blobs:
    """Random weights of a cascade: `nets` holds "c", "s" or "s-thin" (a first S by its two ways of
    naming), "sd", "fusion"."""
    rng = np.random.default_rng(seed)
    blobs: Blobs = {}

    def add(name: str, outputs: int, inputs: int, k: int, deconv: bool = False) -> None:
        shape = (inputs, outputs, k, k) if deconv else (outputs, inputs, k, k)
        fan = inputs * (4 if deconv else k * k)
        gain = 0.5 if outputs == 2 else 1.4
        weight = rng.standard_normal(shape) * gain / np.sqrt(fan)
        blobs[name] = [weight.astype(np.float32), rng.normal(0, 0.05, outputs).astype(np.float32)]

    def w(channels: int) -> int:
        return int(channels * width)

    def decoder(prefix: str, start: str, levels: list[tuple[int, int, int]], inter: bool) -> None:
        channels, top = levels[0][1], levels[0][0]
        add(_prediction(prefix, start, top), 2, channels, 3)
        for level, skip, deconv in levels[1:]:
            add(f"{prefix}deconv{level}", deconv, channels, 4, deconv=True)
            add(_upflow(prefix, level + 1), 2, 2, 4, deconv=True)
            channels = skip + deconv + 2
            if inter:
                add(f"{prefix}interconv{level}", deconv, channels, 3)
            add(_prediction(prefix, start, level), 2, deconv if inter else channels, 3)

    first = True
    for position, kind in enumerate(nets, start=1):
        if kind in ("c", "s", "s-thin"):
            prefix = "" if first else f"net{position}_"
            inputs = 3 if kind == "c" else 6 if first else 12
            add(f"{prefix}conv1", w(64), inputs, 7)
            add(f"{prefix}conv2", w(128), w(64), 5)
            add(f"{prefix}conv3", w(256), w(128), 5)
            if kind == "c":
                add("conv_redir", w(32), w(256), 1)
            add(f"{prefix}conv3_1", w(256), w(32) + 441 if kind == "c" else w(256), 3)
            previous = w(256)
            for name, channels in TAIL:
                add(prefix + name, w(channels), previous, 3)
                previous = w(channels)
            decoder(prefix, kind, [(6, w(1024), 0), (5, w(512), w(512)), (4, w(512), w(256)),
                                   (3, w(256), w(128)), (2, w(128), w(64))], False)  # fmt: skip
            first = False
        elif kind == "sd":
            prefix = "" if len(nets) == 1 else "netsd_"
            previous = 6
            for name, channels in [*FUSION, ("conv3", 256), ("conv3_1", 256), *TAIL]:
                add(prefix + name, channels, previous, 3)
                previous = channels
            decoder(prefix, "", [(6, 1024, 0), (5, 512, 512), (4, 512, 256), (3, 256, 128),
                                 (2, 128, 64)], True)  # fmt: skip
        else:
            previous = 11
            for name, channels in FUSION:
                add("fuse_" + name, channels, previous, 3)
                previous = channels
            decoder("fuse_", "", [(2, 128, 0), (1, 128, 32), (0, 64, 16)], True)
    for layer, mean in (("img0s_aug", (0.41, 0.43, 0.45)), ("img1s_aug", (0.40, 0.44, 0.46))):
        blobs[layer] = [
            np.zeros((1, 1, 1, 1), np.float32),
            np.zeros((1, 3, 4, 4), np.float32),
            np.array(mean, np.float32).reshape(1, 3, 1, 1),
        ]
    return blobs


def write_h5(path: Path, blobs: Blobs) -> Path:
    """Write a ``.caffemodel.h5`` as Caffe does."""
    with h5py.File(path, "w") as file:
        for layer, values in blobs.items():
            for index, value in enumerate(values):
                file[f"data/{layer}/{index}"] = value
        file.create_group("data/blob44")  # layers without weights have empty groups
    return path


def correlate(a: Array, b: Array) -> Array:
    """FlowNet's correlation: 21 x 21 displacements in steps of 2, mean over channels."""
    _, channels, height, width = a.shape
    padded = np.pad(b, ((0, 0), (0, 0), (20, 20), (20, 20)))
    return np.stack(
        [
            (a * padded[:, :, dy : dy + height, dx : dx + width]).sum(1) / channels
            for dy in range(0, 41, 2)
            for dx in range(0, 41, 2)
        ],
        axis=1,
    )


def warp(image: Array, flow: Array, edge: bool = False) -> Array:
    """Caffe's FlowWarp: zero outside, or clamped; right and lower neighbours are clamped."""
    n, _, height, width = image.shape
    out = np.zeros_like(image)
    for i in range(n):
        x2, y2 = np.arange(width) + flow[i, 0], np.arange(height)[:, None] + flow[i, 1]
        if edge:
            x2, y2 = x2.clip(0, width - 1), y2.clip(0, height - 1)
        y, x = np.nonzero((x2 >= 0) & (y2 >= 0) & (x2 < width) & (y2 < height))
        x2, y2 = x2[y, x], y2[y, x]
        left, top = x2.astype(int), y2.astype(int)
        right, bottom = np.minimum(left + 1, width - 1), np.minimum(top + 1, height - 1)
        p, q = x2 - left, y2 - top
        out[i][:, y, x] = (1 - q) * (
            (1 - p) * image[i][:, top, left] + p * image[i][:, top, right]
        ) + q * ((1 - p) * image[i][:, bottom, left] + p * image[i][:, bottom, right])
    return out


def resample_weights(old: int, new: int, other_factor: float) -> Array:
    """[new, old] weights of Caffe's Resample along one axis, a tap at a time."""
    factor = old / new
    widened = factor > 1 or other_factor > 1
    reach = 2 if factor < 1 else math.ceil(2 * factor) if widened else 2
    weights = np.zeros((new, old))
    for out in range(new):
        centre = out * factor + other_factor / 2 - 0.5
        nearest = int(math.copysign(math.floor(abs(centre) + 0.5), centre))
        for tap in range(max(nearest - reach, 0), min(nearest + reach, old - 1) + 1):
            distance = abs(tap - centre)
            weights[out, tap] = max(0.0, 1 - (distance / factor if widened else distance))
        total = weights[out].sum()
        if total > 0:
            weights[out] /= total
    return weights


def resample(x: Array, height: int, width: int) -> Array:
    """Caffe's Resample (LINEAR, antialias), which applies each axis's factor to the other axis."""
    old_height, old_width = x.shape[2:]
    vertical = resample_weights(old_height, height, old_width / width)
    horizontal = resample_weights(old_width, width, old_height / height)
    return vertical @ x @ horizontal.T


def upsample_aligned(x: Array, height: int, width: int) -> Array:
    """Bilinear with corners aligned, one axis after the other."""
    for axis, size in ((2, height), (3, width)):
        old = x.shape[axis]
        at = np.arange(size) * ((old - 1) / (size - 1))
        low = np.floor(at).astype(int)
        high = np.minimum(low + 1, old - 1)
        share = (at - low).reshape([-1 if i == axis else 1 for i in range(4)])
        x = np.take(x, low, axis) * (1 - share) + np.take(x, high, axis) * share
    return x


def upsample_centred(x: Array, height: int, width: int) -> Array:
    """Bilinear between the pixels' centres, one axis after the other."""
    for axis, size in ((2, height), (3, width)):
        old = x.shape[axis]
        at = ((np.arange(size) + 0.5) * (old / size) - 0.5).clip(0)
        low = np.floor(at).astype(int)
        high = np.minimum(low + 1, old - 1)
        share = (at - low).reshape([-1 if i == axis else 1 for i in range(4)])
        x = np.take(x, low, axis) * (1 - share) + np.take(x, high, axis) * share
    return x


def norm(x: Array) -> Array:
    """L2 norm over channels."""
    return np.sqrt((x * x).sum(1, keepdims=True))


def _leaky(x: Array) -> Array:
    return np.where(x > 0, x, 0.1 * x)


class _Net:
    def __init__(self, blobs: Blobs, prefix: str) -> None:
        self.blobs, self.prefix = blobs, prefix

    def linear(self, name: str, x: Array, stride: int = 1) -> Array:
        weight, bias = (torch.from_numpy(v.astype(np.float64)) for v in self.blobs[name])
        k = weight.shape[-1]
        return F.conv2d(torch.from_numpy(x), weight, bias, stride, (k - 1) // 2).numpy()

    def conv(self, name: str, x: Array, stride: int = 1) -> Array:
        return _leaky(self.linear(self.prefix + name, x, stride))

    def deconv(self, name: str, x: Array) -> Array:
        weight, bias = (torch.from_numpy(v.astype(np.float64)) for v in self.blobs[name])
        return F.conv_transpose2d(torch.from_numpy(x), weight, bias, 2, 1).numpy()

    def decode(self, start: str, top: Array, skips: dict[int, Array], inter: bool) -> Array:
        concat, level = top, max(skips) + 1
        flow = self.linear(_prediction(self.prefix, start, level), top)
        while level > min(skips):
            level -= 1
            up = _leaky(self.deconv(f"{self.prefix}deconv{level}", concat))
            flow_up = self.deconv(_upflow(self.prefix, level + 1), flow)
            height, width = skips[level].shape[2:]  # smaller if sides are not multiples of 64
            up, flow_up = up[:, :, :height, :width], flow_up[:, :, :height, :width]
            concat = np.concatenate([skips[level], up, flow_up], 1)
            read = self.linear(f"{self.prefix}interconv{level}", concat) if inter else concat
            flow = self.linear(_prediction(self.prefix, start, level), read)
        return flow


def _tail(net: _Net, x: Array) -> tuple[Array, dict[int, Array]]:
    conv4 = net.conv("conv4_1", net.conv("conv4", x, 2))
    conv5 = net.conv("conv5_1", net.conv("conv5", conv4, 2))
    conv6 = net.conv("conv6_1", net.conv("conv6", conv5, 2))
    return conv6, {5: conv5, 4: conv4, 3: x}


def _c(net: _Net, image1: Array, image2: Array, summed: bool) -> Array:
    a2 = net.conv("conv2", net.conv("conv1", image1, 2), 2)
    b2 = net.conv("conv2", net.conv("conv1", image2, 2), 2)
    a3, b3 = net.conv("conv3", a2, 2), net.conv("conv3", b2, 2)
    cost = _leaky(correlate(a3, b3)) * (a3.shape[1] if summed else 1)
    joined = np.concatenate([net.conv("conv_redir", a3), cost], 1)
    top, skips = _tail(net, net.conv("conv3_1", joined))
    return net.decode("c", top, skips | {2: a2}, False)


def _s(net: _Net, start: str, x: Array) -> Array:
    conv2 = net.conv("conv2", net.conv("conv1", x, 2), 2)
    top, skips = _tail(net, net.conv("conv3_1", net.conv("conv3", conv2, 2)))
    return net.decode(start, top, skips | {2: conv2}, False)


def _sd(net: _Net, x: Array) -> Array:
    conv1 = net.conv("conv1_1", net.conv("conv1", net.conv("conv0", x), 2))
    conv2 = net.conv("conv2_1", net.conv("conv2", conv1, 2))
    top, skips = _tail(net, net.conv("conv3_1", net.conv("conv3", conv2, 2)))
    return net.decode("", top, skips | {2: conv2}, True)


def _normalise(image: Array, blobs: Blobs, layer: str, pair: Array, options: Options) -> Array:
    order = slice(None) if options.rgb else slice(None, None, -1)
    if options.mean == "stored":
        mean = blobs[layer][2].reshape(3)
    elif isinstance(options.mean, str):
        of = pair if options.mean == "pair" else image[:, None]
        mean = of.mean((1, 2, 3))[:, None, None, order] / 255.0
    else:
        mean = np.array(options.mean)
    return (image[..., order] / 255.0 - mean).transpose(0, 3, 1, 2)


def run(
    nets: list[str], blobs: Blobs, image1: Array, image2: Array, options: Options = CAFFE
) -> Array:
    """Compute flow ``[N, H, W, 2]`` in float64 from uint8 RGB ``[N, H, W, 3]``."""
    height, width = image1.shape[1:3]
    big = [-(-size // 64) * 64 if options.resized else size for size in (height, width)]
    both = np.stack([image1, image2], 1)
    first, second = (
        _normalise(image, blobs, layer, both, options)
        for image, layer in ((image1, "img0s_aug"), (image2, "img1s_aug"))
    )
    if options.resized:
        first, second = resample(first, *big), resample(second, *big)
    pair = np.concatenate([first, second], 1)
    cascade = [kind for kind in nets if kind in ("c", "s", "s-thin")]
    sd = None
    if "sd" in nets:
        sd = _sd(_Net(blobs, "" if nets == ["sd"] else "netsd_"), pair) * options.sd_unit
    upsample = upsample_aligned if options.aligned else upsample_centred
    prediction = None
    for position, kind in enumerate(cascade, start=1):
        net = _Net(blobs, "" if position == 1 else f"net{position}_")
        if prediction is None:
            prediction = (
                _c(net, first, second, options.summed) if kind == "c" else _s(net, kind, pair)
            )
        else:
            flow = upsample(prediction * options.unit, *big)
            warped = warp(second, flow, options.edge)
            inputs = [pair, warped, flow / options.unit, norm(first - warped)]
            prediction = _s(net, kind, np.concatenate(inputs, 1))
    if "fusion" in nets:
        assert prediction is not None
        assert sd is not None
        css, sd = ((x).repeat(4, 2).repeat(4, 3) for x in (prediction * options.unit, sd))
        inputs = [first, sd, css, norm(sd), norm(css),
                  norm(first - warp(second, sd, options.edge)),
                  norm(first - warp(second, css, options.edge))]  # fmt: skip
        net = _Net(blobs, "fuse_")
        x = np.concatenate(inputs, 1)
        conv0 = net.conv("conv0", x)
        conv1 = net.conv("conv1_1", net.conv("conv1", conv0, 2))
        conv2 = net.conv("conv2_1", net.conv("conv2", conv1, 2))
        flow = net.decode("", conv2, {1: conv1, 0: conv0}, True)
    else:
        flow = prediction * options.unit if prediction is not None else sd
    if not options.resized:
        return upsample_centred(flow, height, width).transpose(0, 2, 3, 1)
    scale = np.array([width / big[1], height / big[0]])
    return resample(flow, height, width).transpose(0, 2, 3, 1) * scale

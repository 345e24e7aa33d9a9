"""Checkpoints in the formats of other projects, from weights by Caffe's layer names.

The names were copied from files of each project.
"""

from typing import Any

import numpy as np
import torch

from tests.support.caffe_reference import Blobs

State = dict[str, torch.Tensor]

_CORR = {
    "conv_redir": "corr_encoder.conv_redir.conv",
    "conv3_1": "corr_encoder.layers.0.layers.0.conv",
    "conv4": "corr_encoder.layers.1.layers.0.conv",
    "conv4_1": "corr_encoder.layers.1.layers.1.conv",
    "conv5": "corr_encoder.layers.2.layers.0.conv",
    "conv5_1": "corr_encoder.layers.2.layers.1.conv",
    "conv6": "corr_encoder.layers.3.layers.0.conv",
    "conv6_1": "corr_encoder.layers.3.layers.1.conv",
}
_ENCODER = {
    "conv1": "encoder.layers.0.layers.0.conv",
    "conv1_1": "encoder.layers.0.layers.1.conv",
    "conv2": "encoder.layers.1.layers.0.conv",
    "conv2_1": "encoder.layers.1.layers.1.conv",
    "conv3": "encoder.layers.2.layers.0.conv",
    "conv3_1": "encoder.layers.2.layers.1.conv",
    "conv4": "encoder.layers.3.layers.0.conv",
    "conv4_1": "encoder.layers.3.layers.1.conv",
    "conv5": "encoder.layers.4.layers.0.conv",
    "conv5_1": "encoder.layers.4.layers.1.conv",
    "conv6": "encoder.layers.5.layers.0.conv",
    "conv6_1": "encoder.layers.5.layers.1.conv",
}
_DECODER = {
    f"{new}{level}": f"decoder.decoders.level{level + above}.{module}"
    for level in range(2, 7)
    for new, above, module in (
        ("predict", 0, "pred_out"),
        ("deconv", 1, "deconv_out.deconvs.0"),
        ("upflow", 1, "upsample_pred.deconvs.0"),
    )
}
_SD = {
    **_ENCODER,
    **_DECODER,
    "conv0": "encoder.plugin_layer.conv",
    **{f"predict{i}": f"decoder.decoders.level{i}.pred_out.1" for i in range(2, 6)},
    **{f"interconv{i}": f"decoder.decoders.level{i}.pred_out.0" for i in range(2, 6)},
}
_FUSION = {
    "conv0": "encoder.layers.0.layers.0.conv",
    "conv1": "encoder.layers.1.layers.0.conv",
    "conv1_1": "encoder.layers.1.layers.1.conv",
    "conv2": "encoder.layers.2.layers.0.conv",
    "conv2_1": "encoder.layers.2.layers.1.conv",
    "predict2": "decoder.decoders.level3.pred_out",
    "deconv1": "decoder.decoders.level3.deconv_out.deconvs.0",
    "upflow1": "decoder.decoders.level3.upsample_pred.deconvs.0",
    "interconv1": "decoder.decoders.level2.pred_out.0",
    "predict1": "decoder.decoders.level2.pred_out.1",
    "deconv0": "decoder.decoders.level2.deconv_out.deconvs.0",
    "upflow0": "decoder.decoders.level2.upsample_pred.deconvs.0",
    "interconv0": "decoder.decoders.level1.pred_out.0",
    "predict0": "decoder.decoders.level1.pred_out.1",
}
MMFLOW = {
    "c": {**_ENCODER, **_DECODER, **_CORR},
    "s": {**_ENCODER, **_DECODER},
    "sd": _SD,
    "fusion": _FUSION,
}


def _layer(caffe: str) -> tuple[str, str]:
    """Split a Caffe name into its net ("", "net2", "net3", "netsd", "fuse") and our layer."""
    net = next((n for n in ("net2", "net3", "netsd", "fuse") if caffe.startswith(f"{n}_")), "")
    name = caffe
    while net and name.startswith(f"{net}_"):
        name = name.removeprefix(f"{net}_")
    name = name.lstrip("_")
    if name.startswith("Convolution"):
        name = f"predict{7 - int(name[-1])}"
    elif name.startswith("predict_conv"):
        name = f"predict{name[-1]}"
    elif name.startswith("upsample_flow"):
        name = f"upflow{name[-1]}"
    return net, name


def _nets(nets: list[str]) -> dict[str, str]:
    """Kind of each net by its Caffe prefix."""
    alone = nets == ["sd"]
    kinds = {"": "sd" if alone else nets[0][0], "net2": "s", "net3": "s"}
    return kinds | {"netsd": "sd", "fuse": "fusion"}


def mmflow(nets: list[str], blobs: Blobs) -> State:
    """Name weights as mmflow does; deconvolutions of S have no bias in `upsample_pred`."""
    css = {"": "flownetC.", "net2": "flownetS1.", "net3": "flownetS2."}
    prefixes: dict[str, str] = {"": ""}
    if len(nets) > 1:
        prefixes = {k: "flownetCSS." * ("fusion" in nets) + v for k, v in css.items()}
        prefixes |= {"netsd": "flownetSD.", "fuse": "flownet_fusion."}
    state: State = {}
    for caffe, (weight, bias) in _layers(blobs):
        net, layer = _layer(caffe)
        kind = _nets(nets)[net]
        name = prefixes[net] + MMFLOW[kind][layer]
        state[f"{name}.weight"] = weight
        if kind == "s" and layer.startswith("upflow"):
            bias.zero_()
        else:
            state[f"{name}.bias"] = bias
    return state


def nvidia(nets: list[str], blobs: Blobs, biases: bool = True, norm: str = "") -> State:
    """Name weights as NVIDIA/flownet2-pytorch and its descendants do.

    Args:
        biases: whether deconvolutions, predictions and upsampled flow have biases; zeroed
            otherwise.
        norm: a layer that a batch-norm follows; the weights in `blobs` become the folded ones.
    """
    prefixes = {"": "flownetc.", "net2": "flownets_1.", "net3": "flownets_2."}
    prefixes |= {"netsd": "flownets_d.", "fuse": "flownetfusion."}
    state: State = {}
    for caffe, (weight, bias) in _layers(blobs):
        net, layer = _layer(caffe)
        name = layer.replace("interconv", "inter_conv") + ".0"
        if layer.startswith("predict"):
            name = f"predict_flow{layer[-1]}"
        elif layer.startswith("upflow"):
            name = f"upsampled_flow{int(layer[-1]) + 1}_to_{layer[-1]}"
        name = ("" if len(nets) == 1 else prefixes[net]) + name
        state[f"{name}.weight"] = weight.clone()
        if not biases and layer.startswith(("predict", "upflow", "deconv")):
            bias.zero_()
        elif layer == norm and not net:
            count = len(bias)
            gain, shift, mean = (torch.rand(count) + 0.5 for _ in range(3))
            variance = torch.rand(count) + 0.5
            batch_norm = f"{name.removesuffix('0')}1"
            state |= {
                f"{batch_norm}.weight": gain,
                f"{batch_norm}.bias": shift,
                f"{batch_norm}.running_mean": mean,
                f"{batch_norm}.running_var": variance,
                f"{batch_norm}.num_batches_tracked": torch.tensor(3),
            }
            factor = gain / (variance + 1e-5).sqrt()
            weight.mul_(factor[:, None, None, None])
            bias.copy_(shift - mean * factor)
        else:
            state[f"{name}.bias"] = bias
    return state


def _layers(blobs: Blobs) -> list[tuple[str, list[torch.Tensor]]]:
    """Weight and bias of each layer, as tensors that share the blobs' memory."""
    return [
        (name, [torch.from_numpy(np.asarray(value)) for value in values])
        for name, values in blobs.items()
        if not name.endswith("_aug")
    ]


def checkpoint(state: State, prefix: str = "", **values: Any) -> dict[str, Any]:
    """Put a state_dict into a checkpoint, with the other values that its project saves."""
    return {**values, "state_dict": {prefix + name: value for name, value in state.items()}}

"""Caffe's ``.caffemodel`` (binary) and ``.caffemodel.h5`` of the original release."""

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format
from google.protobuf.message import DecodeError
from numpy.typing import NDArray

from export.networks import Network
from export.weights.file import AUTHORS_LICENSE, Layer, WeightFile, WeightsError

# The part of caffe.proto that holds weights. Packed floats are declared as bytes, which have the
# same encoding, so that NumPy reads them without a copy.
SCHEMA = """
name: "caffe.proto" package: "caffe"
message_type { name: "BlobShape"
  field { name: "dim" number: 1 label: LABEL_REPEATED type: TYPE_INT64 } }
message_type { name: "BlobProto"
  field { name: "num" number: 1 type: TYPE_INT32 }
  field { name: "channels" number: 2 type: TYPE_INT32 }
  field { name: "height" number: 3 type: TYPE_INT32 }
  field { name: "width" number: 4 type: TYPE_INT32 }
  field { name: "data" number: 5 type: TYPE_BYTES }
  field { name: "shape" number: 7 type_name: ".caffe.BlobShape" }
  field { name: "double_data" number: 8 type: TYPE_BYTES } }
message_type { name: "LayerParameter"
  field { name: "name" number: 1 type: TYPE_STRING }
  field { name: "blobs" number: 7 label: LABEL_REPEATED type_name: ".caffe.BlobProto" } }
message_type { name: "V1LayerParameter"
  field { name: "name" number: 4 type: TYPE_STRING }
  field { name: "blobs" number: 6 label: LABEL_REPEATED type_name: ".caffe.BlobProto" } }
message_type { name: "NetParameter"
  field { name: "layers" number: 2 label: LABEL_REPEATED type_name: ".caffe.V1LayerParameter" }
  field { name: "layer" number: 100 label: LABEL_REPEATED type_name: ".caffe.LayerParameter" } }
"""

CAFFE_PREFIX = {"net1": "", "net2": "net2_", "net3": "net3_", "sd": "netsd_", "fusion": "fuse_"}


def caffe_names(network: Network, block: str, layer: str) -> tuple[str, ...]:
    """Return a layer's names in the original release (prototxts of lmb-freiburg/flownet2)."""
    prefix = "" if network.cascade == ("SD",) else CAFFE_PREFIX[block]
    if layer.startswith("predict"):
        level = int(layer.removeprefix("predict"))
        numbered, named = f"Convolution{7 - level}", f"predict_conv{level}"
        if block in ("net2", "net3"):
            return (prefix + named,)
        if block == "fusion":
            return (f"{prefix}_{numbered}",)
        if block == "net1" and network.cascade[0] == "S":
            return (named, numbered)
        return (prefix + numbered,)
    if layer.startswith("upflow"):
        level = int(layer.removeprefix("upflow"))
        twice = prefix if block in ("net2", "net3") else ""
        return (f"{prefix}{twice}upsample_flow{level + 1}to{level}",)
    return (prefix + layer,)


def read_hdf5(path: Path) -> WeightFile:
    """Read a ``.caffemodel.h5``."""
    try:
        with h5py.File(path, "r") as file:
            group = file.get("data")
            if not isinstance(group, h5py.Group):
                raise WeightsError(f"{path.name}: an HDF5 file without Caffe's group /data")
            blobs = {
                name: [np.asarray(layer[str(i)]) for i in range(len(layer))]
                for name, layer in group.items()
            }
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise WeightsError(f"{path.name}: broken HDF5 file: {error}") from error
    return _from_caffe_blobs(path, blobs)


def read_caffemodel(path: Path) -> WeightFile:
    """Read a binary ``.caffemodel``."""
    pool = descriptor_pool.DescriptorPool()
    pool.Add(text_format.Parse(SCHEMA, descriptor_pb2.FileDescriptorProto()))
    net: Any = message_factory.GetMessageClass(pool.FindMessageTypeByName("caffe.NetParameter"))()
    try:
        net.ParseFromString(path.read_bytes())
    except DecodeError as error:
        raise WeightsError(
            f"{path.name}: neither a Caffe model, nor HDF5, nor a PyTorch checkpoint, "
            "nor safetensors"
        ) from error
    blobs = {
        layer.name: [_blob_array(path, layer.name, blob) for blob in layer.blobs]
        for layer in itertools.chain(net.layer, net.layers)
    }
    if not any(blobs.values()):
        raise WeightsError(f"{path.name}: holds no layer with weights")
    return _from_caffe_blobs(path, blobs)


def _blob_array(path: Path, layer: str, blob: Any) -> NDArray[np.float32]:
    values = np.frombuffer(blob.double_data, "<f8").astype(np.float32)
    if not len(values):
        values = np.frombuffer(blob.data, "<f4")
    shape = tuple(blob.shape.dim) or (blob.num, blob.channels, blob.height, blob.width)
    if not shape or int(np.prod(shape)) != len(values):
        raise WeightsError(
            f"{path.name}: layer {layer} declares {'x'.join(map(str, shape))} values "
            f"and holds {len(values)}; the file is cut off or of another format"
        )
    return values.reshape(shape)


def _from_caffe_blobs(path: Path, blobs: Mapping[str, list[NDArray[Any]]]) -> WeightFile:
    """Convert Caffe's blobs of each layer.

    Layers have a weight and a bias; ``DataAugmentation`` layers have an iteration count, a
    per-pixel mean and a per-channel mean.
    """
    means = []
    for layer in ("img0s_aug", "img1s_aug"):
        if len(blobs.get(layer, ())) != 3 or blobs[layer][2].size != 3:
            raise WeightsError(
                f"{path.name}: layer {layer} with the per-channel mean as third blob is missing"
            )
        means.append(torch.from_numpy(blobs[layer][2].astype(np.float32).reshape(3)))
    layers = {}
    for name, values in blobs.items():
        # scale_conv1 holds the scale of one input size; all other layers without a four-axis
        # first blob hold no weights of the network.
        if not values or values[0].ndim != 4 or name in ("img0s_aug", "img1s_aug", "scale_conv1"):
            continue
        tensors = [torch.from_numpy(np.array(value, np.float32)) for value in values]
        layers[name] = Layer(tensors[0], tensors[1].reshape(-1) if len(tensors) > 1 else None)
    return WeightFile(
        layers,
        caffe_names,
        source=path.name,
        license=AUTHORS_LICENSE,
        description="Caffe: BGR, stored mean",
        mean1=means[0],
        mean2=means[1],
    )

"""Reading and writing weight files.

Read: Caffe ``.caffemodel`` (binary) and ``.caffemodel.h5`` of the original release, ``.pth.tar``
checkpoints of NVIDIA's port, and our own ``.safetensors``. The kind of file is told by its content.
Nothing in a file is executed.
"""

from export.weights.file import Layer, WeightFile, WeightsError
from export.weights.load import load_weights, read_weights
from export.weights.safetensors import save_weights

__all__ = ["Layer", "WeightFile", "WeightsError", "load_weights", "read_weights", "save_weights"]

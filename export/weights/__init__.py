"""Reading and writing of weight files.

The readers take Caffe's ``.caffemodel`` and ``.caffemodel.h5`` of the original release, PyTorch
checkpoints of the projects in :mod:`export.weights.sources`, and our own ``.safetensors``. The
content of a file determines its kind. Nothing in a file is executed.
"""

from export.weights.file import Layer, WeightFile, WeightsError
from export.weights.load import load_weights, read_weights
from export.weights.safetensors import save_weights

__all__ = ["Layer", "WeightFile", "WeightsError", "load_weights", "read_weights", "save_weights"]

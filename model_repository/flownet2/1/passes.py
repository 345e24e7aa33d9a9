"""An exported network as an OpenVINO graph, rewritten for the CPU.

Each pass is a function of a model. Its docstring states its gain: the CPU time of FlowNet2-cs at
512x512 on two cores of a Xeon with AMX, in bfloat16. All together bring it from 60 to 30 ms.
"""

from pathlib import Path

import onnx
import onnx.inliner
import openvino

from flownet2.contract import IMAGE_INPUTS

from .bfloat16 import cast_to_bfloat16
from .cost_volume import cost_volumes, divide_in_weights, multiply_in_blocks
from .image_planes import read_levels, read_whole_numbers, turn_bytes
from .predictions import split_predictions
from .resampling import remove_idle_resampling
from .rewriting import fold_constants
from .upsampling import upsample_by_gather
from .widening import widen_concats


class Graph:
    """A network's graph, from which the graphs for fixed shapes are made.

    Attributes:
        metadata: of the ONNX file.
    """

    def __init__(self, path: Path, bfloat16: bool, amx: bool) -> None:
        """Read an exported network.

        Args:
            path: the exporter's ``model.onnx``.
            bfloat16: True to run convolutions in bfloat16.
            amx: True if the CPU has AMX.
        """
        network = onnx.load(path)
        self.metadata = {entry.key: entry.value for entry in network.metadata_props}
        # OpenVINO knows neither our op nor model-local functions: inline the function's body.
        inlined = onnx.inliner.inline_local_functions(network)
        model = openvino.Core().read_model(inlined.SerializeToString())
        fold_constants(model)
        turn_bytes(model)
        volumes = cost_volumes(network)
        self._volumes = [names for names in volumes if divide_in_weights(model, names)]
        if bfloat16:
            read_levels(model)
            if amx:
                widen_concats(model)
            cast_to_bfloat16(model)
        split_predictions(model)
        self._model = model

    def for_shape(self, shape: tuple[int, ...]) -> openvino.Model:
        """Return a graph for images ``[1, H, W, 3]`` of one shape."""
        model = self._model.clone()
        model.reshape({name: list(shape) for name in IMAGE_INPUTS})
        remove_idle_resampling(model)
        for names in self._volumes:
            multiply_in_blocks(model, names)
        upsample_by_gather(model)
        read_whole_numbers(model)  # changes nothing in float32
        return model

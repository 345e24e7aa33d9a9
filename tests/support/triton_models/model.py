"""A Triton model for the gateway's tests: the contract's tensors, a flow in closed form.

flow[y, x] = ((R2 - R1) / 8, (G2 - G1) / 8), differences of the two images' red and green at (y, x).

The model's `parameters` choose how it misbehaves: `delay_s` sleeps before the response and stops
early when the request is cancelled; `journal` names a file that gets a line per request ("done" or
"cancelled"); `fault` is "nan" (a non-finite flow), "far" (one of 1e28 pixels) or "raise".

Tensors pass as DLPack: the stub is compiled against NumPy 1 and misreads arrays of NumPy 2. A
capsule that the stub has used must get the name by which NumPy knows a used one.
"""

import ctypes
import json
import os
import sys
import time

# The stub ignores PYTHONPATH, and would find the NumPy of some other environment.
sys.path[:0] = os.environ.get("PYTHONPATH", "").split(os.pathsep)

import numpy as np  # noqa: E402
import triton_python_backend_utils as pb_utils  # noqa: E402


class Lent:
    def __init__(self, array):
        self.array = array

    def __dlpack__(self, **options):
        self.capsule = self.array.__dlpack__(**options)
        return self.capsule

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()

    def __del__(self):
        ctypes.pythonapi.PyCapsule_SetName(ctypes.py_object(self.capsule), b"used_dltensor")


class TritonPythonModel:
    def initialize(self, args):
        parameters = {
            key: value["string_value"]
            for key, value in json.loads(args["model_config"])["parameters"].items()
        }
        self.delay_s = float(parameters.get("delay_s", 0))
        self.journal = parameters.get("journal")
        self.fault = parameters.get("fault")

    def execute(self, requests):
        return [self._answer(request) for request in requests]

    def _answer(self, request):
        end = time.monotonic() + self.delay_s
        while time.monotonic() < end and not request.is_cancelled():
            time.sleep(0.01)
        if self.journal:
            with open(self.journal, "a") as journal:
                journal.write("cancelled\n" if request.is_cancelled() else "done\n")
        if self.fault == "raise":
            return pb_utils.InferenceResponse(error=pb_utils.TritonError("a fault made on purpose"))
        first, second = (
            np.from_dlpack(pb_utils.get_input_tensor_by_name(request, name)).astype(np.float32)
            for name in ("image1", "image2")
        )
        flow = (second - first)[..., :2] / 8
        if self.fault == "nan":
            flow[0, 0, 0, 0] = np.nan
        if self.fault == "far":
            flow[0, 0, 0, 0] = -1e28
        lent = Lent(np.ascontiguousarray(flow))
        return pb_utils.InferenceResponse([pb_utils.Tensor.from_dlpack("flow", lent)])

"""A Triton model for the gateway's tests: the contract's tensors, a flow in closed form.

flow[y, x] = ((R2 - R1) / 8, (G2 - G1) / 8), differences of the two images' red and green at (y, x).

The model's `parameters` choose its faults: `delay_s` sleeps before the response and stops early if
the request is cancelled; `journal` names a file that gets the lines "started" and then "done" or
"cancelled" for each request; `fault` is "nan" (a flow that is not finite), "far" (a component of
1e28 pixels) or "raise".

Tensors pass as DLPack: the stub is compiled against NumPy 1 and misreads arrays of NumPy 2. A
capsule that the stub has used must get the name that NumPy gives to used capsules.
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


class Output:
    """Array that passes to the stub as DLPack."""

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
        self._note("started")
        end = time.monotonic() + self.delay_s
        while time.monotonic() < end and not request.is_cancelled():
            time.sleep(0.01)
        self._note("cancelled" if request.is_cancelled() else "done")
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
        output = Output(np.ascontiguousarray(flow))
        return pb_utils.InferenceResponse([pb_utils.Tensor.from_dlpack("flow", output)])

    def _note(self, event):
        if self.journal:
            with open(self.journal, "a") as journal:
                journal.write(f"{event}\n")

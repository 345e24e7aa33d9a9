"""A stand-in for TensorRT's Python package: its plans are run by ONNX Runtime on the CPU.

Its GPU is tests/support/libcuda.c, whose memory is this process's. FAKE_TENSORRT_ERROR, in pixels,
makes its flow wrong. It has the part of TensorRT's interface that export/engine uses.
"""

import ctypes
import os

import numpy as np
import onnxruntime

__version__ = "11.0.fake"


class ILogger:
    class Severity:
        INTERNAL_ERROR, ERROR, WARNING = range(3)


class IProgressMonitor:
    pass


class NetworkDefinitionCreationFlag:
    STRONGLY_TYPED = 1


def get_plugin_registry():
    return Registry()


class Registry:
    def get_creator(self, *name):
        return object()


class Network:
    num_layers = 0
    model = b""


class OnnxParser:
    def __init__(self, network, log):
        self.network = network

    def parse(self, model):
        self.network.model = model
        return True


class Profile:
    def set_shape(self, name, *sizes):
        pass


class Configuration:
    def add_optimization_profile(self, profile):
        pass

    def create_timing_cache(self, measured):
        return self

    def set_timing_cache(self, cache, ignore_mismatch):
        return True

    def get_timing_cache(self):
        return self

    def serialize(self):
        return b""


class Builder:
    def __init__(self, log):
        pass

    def create_network(self, flags):
        return Network()

    def create_builder_config(self):
        return Configuration()

    def create_optimization_profile(self):
        return Profile()

    def build_serialized_network(self, network, configuration):
        return network.model


class Runtime:
    def __init__(self, log):
        pass

    def deserialize_cuda_engine(self, plan):
        return Engine(plan)


class Engine:
    def __init__(self, plan):
        self.session = onnxruntime.InferenceSession(plan, providers=["CPUExecutionProvider"])

    def create_execution_context(self):
        return Context(self.session)


class Context:
    def __init__(self, session):
        self.session, self.shapes, self.addresses = session, {}, {}

    def set_optimization_profile_async(self, profile, stream):
        return True

    def set_input_shape(self, name, shape):
        self.shapes[name] = tuple(shape)
        return True

    def set_tensor_address(self, name, address):
        self.addresses[name] = address
        return True

    def get_tensor_shape(self, name):
        return (*self.shapes["image1"][:3], 2)

    def get_max_output_size(self, name):
        return 8 * 576 * 576 * 2 * 4

    def execute_async_v3(self, stream):
        images = {}
        for name, shape in self.shapes.items():
            size = int(np.prod(shape))
            pixels = ctypes.string_at(self.addresses[name], size)
            images[name] = np.frombuffer(pixels, np.uint8).reshape(shape)
        (flow,) = self.session.run(["flow"], images)
        flow += float(os.environ.get("FAKE_TENSORRT_ERROR", "0"))
        ctypes.memmove(self.addresses["flow"], flow.ctypes.data, flow.nbytes)
        return True

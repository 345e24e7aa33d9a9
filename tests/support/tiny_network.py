"""An ONNX network with the contract's inputs and output that is small enough to write in a test."""

import onnx
from onnx import TensorProto, helper


def tiny_network(producer: str = "test", scale: float = 1.0) -> onnx.ModelProto:
    """Return a convolution of the images' difference: ``scale / 100 * (image2 - image1)``."""
    shape = ["batch", "height", "width"]
    images = [
        helper.make_tensor_value_info(name, TensorProto.UINT8, [*shape, 3])
        for name in ("image1", "image2")
    ]
    flow = helper.make_tensor_value_info("flow", TensorProto.FLOAT, [*shape, 2])
    values = [scale / 100, 0, 0, 0, scale / 100, 0]
    weights = helper.make_tensor("weights", TensorProto.FLOAT, [2, 3, 1, 1], values)
    nodes = [
        helper.make_node("Cast", ["image1"], ["a"], to=TensorProto.FLOAT),
        helper.make_node("Cast", ["image2"], ["b"], to=TensorProto.FLOAT),
        helper.make_node("Sub", ["b", "a"], ["difference"]),
        helper.make_node("Transpose", ["difference"], ["planes"], perm=[0, 3, 1, 2]),
        helper.make_node("Conv", ["planes", "weights"], ["convolved"]),
        helper.make_node("Transpose", ["convolved"], ["flow"], perm=[0, 2, 3, 1]),
    ]
    graph = helper.make_graph(nodes, "graph", images, [flow], [weights])
    opset = helper.make_opsetid("", 18)
    return helper.make_model(graph, producer_name=producer, opset_imports=[opset], ir_version=10)

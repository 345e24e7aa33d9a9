"""FlowNet2 networks in PyTorch, weight import, ONNX export and TensorRT engine build."""

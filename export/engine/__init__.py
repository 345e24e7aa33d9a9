"""The TensorRT engine of an exported model, built on the GPU that will serve it."""

"""Deployable files: ONNX and TensorRT (an empty room until the issue on export)."""

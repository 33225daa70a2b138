"""Deployable files: ONNX, proved to compute what PyTorch does, and TensorRT engines of them."""

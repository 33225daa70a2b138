"""Fused kernels of the guided denoising step (an empty room until the issue on speed)."""

"""Inference: one loop that serves many replies."""

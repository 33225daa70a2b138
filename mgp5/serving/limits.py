"""Bounds of what clients may ask of a server."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Bounds of one HTTP request; a request above them is refused, not cut.

    Args:
        body_bytes: size of a request's body.
        body_seconds: time for the headers of a request to arrive, and again for its body.
        messages: number of messages in a conversation.
        context_images: number of images that a client sends in one conversation.
        pixels: width times height of an image that a client sends.
        tokens: number of text tokens in a reply.
        images: number of images in a reply, or in one call of /v1/images/generations.
        steps: number of denoising steps of an image.
        side: longest side of a drawn image, in pixels.
        seconds: time for a reply, waiting included.
        remote_images: whether images at http and https addresses are fetched.
        fetch_bytes, fetch_seconds: size of such an image, and time to fetch it.
    """

    body_bytes: int = 32 * 2**20
    body_seconds: float = 30.0
    messages: int = 256
    context_images: int = 16
    pixels: int = 16_000_000
    tokens: int = 1024
    images: int = 8
    steps: int = 100
    side: int = 1024
    seconds: float = 600.0
    remote_images: bool = False
    fetch_bytes: int = 16 * 2**20
    fetch_seconds: float = 10.0

    def problems(self) -> list[str]:
        """Return what is wrong with the values, one entry each."""
        least = {"body_seconds": 0.1, "images": 0, "remote_images": 0}
        return [
            f"{name} is {value}, expected {least.get(name, 1)} or more"
            for name, value in vars(self).items()
            if value < least.get(name, 1)
        ]

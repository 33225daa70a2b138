"""What a server lets its clients ask for."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Bounds of a request; above them it is refused, not cut.

    Args:
        body_bytes: of a request.
        body_seconds: that its headers and its body may take to arrive, each.
        messages: in a conversation.
        pictures, pixels: in a conversation, and of each.
        tokens, images, steps: of a reply; `images` also of one call for images.
        side: of a drawn image, in pixels.
        seconds: that a reply may take, waiting included.
        remote_images: whether http addresses of pictures are fetched.
        fetch_bytes, fetch_seconds: of such a picture.
    """

    body_bytes: int = 32 * 2**20
    body_seconds: float = 30.0
    messages: int = 256
    pictures: int = 16
    pixels: int = 16_000_000
    tokens: int = 1024
    images: int = 8
    steps: int = 100
    side: int = 1024
    seconds: float = 600.0
    remote_images: bool = False
    fetch_bytes: int = 16 * 2**20
    fetch_seconds: float = 10.0

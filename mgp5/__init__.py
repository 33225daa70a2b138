"""mgp5: interleaved text and image generation with generative vokens."""

from __future__ import annotations

from .errors import Mgp5Error
from .messages import Conversation, Image, Message, Text

__version__ = "0.1.0"
__all__ = ["Conversation", "Image", "Message", "Mgp5Error", "Options", "Text", "generate", "load"]


def __getattr__(name: str) -> object:
    """`load`, `generate` and `Options` come on first use: they bring torch, which takes seconds to import."""
    if name in ("generate", "Options"):
        from . import generation as module

        return getattr(module, name)
    if name == "load":
        from .model import load

        return load
    raise AttributeError(f"module 'mgp5' has no attribute {name!r}")

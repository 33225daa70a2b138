"""mgp5: interleaved text and image generation with generative vokens, from the command line and from Python."""

from __future__ import annotations

from pathlib import Path as _Path

from .errors import Mgp5Error
from .messages import Conversation, Image, Message, Text
from .options import Options, reply_options

__version__ = "0.1.0"
__all__ = ["Conversation", "Image", "Message", "Mgp5Error", "Options", "Text", "generate", "load", "reply_options"]

# In a checkout kernels/ and export/ lie beside this folder; installed, they lie in it. Neither has an __init__.py, so
# that no top-level import of that name ever finds them before an installed package.
_checkout = _Path(__file__).resolve().parents[1]
if (_checkout / "kernels" / "registry.py").is_file():
    __path__.append(str(_checkout))


def __getattr__(name: str) -> object:
    """Import `load` and `generate` on first use: they bring torch, which takes seconds."""
    if name == "generate":
        from .inference.reply import generate

        return generate
    if name == "load":
        from .apps.open_model import load

        return load
    raise AttributeError(f"module 'mgp5' has no attribute {name!r}")

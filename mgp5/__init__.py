"""mgp5: interleaved text and image generation with a multimodal LLM, from the command line and from Python."""

from __future__ import annotations

from importlib import import_module as _import_module
from pathlib import Path as _Path
from typing import TYPE_CHECKING as _TYPE_CHECKING

if _TYPE_CHECKING:
    from .apps.open_model import load as load
    from .errors import Mgp5Error as Mgp5Error
    from .inference.reply import generate as generate
    from .messages import Conversation as Conversation
    from .messages import Image as Image
    from .messages import Message as Message
    from .messages import Text as Text
    from .options import Options as Options
    from .options import reply_options as reply_options

__version__ = "0.1.0"
__all__ = ["Conversation", "Image", "Message", "Mgp5Error", "Options", "Text", "generate", "load", "reply_options"]

_MODULES = {
    **dict.fromkeys(("Conversation", "Image", "Message", "Text"), "messages"),
    **dict.fromkeys(("Options", "reply_options"), "options"),
    "Mgp5Error": "errors",
    "generate": "inference.reply",
    "load": "apps.open_model",
}

# In a checkout kernels/ and export/ lie beside this folder; installed, they lie in it. Neither has an __init__.py, so
# that no top-level import of that name ever finds them before an installed package.
_checkout = _Path(__file__).resolve().parents[1]
if (_checkout / "kernels" / "registry.py").is_file():
    __path__.append(str(_checkout))


def __getattr__(name: str) -> object:
    """Import a public name on first use: `mgp5 --help` needs none of them, and some bring torch."""
    if name not in _MODULES:
        raise AttributeError(f"module 'mgp5' has no attribute {name!r}")
    value = getattr(_import_module(f".{_MODULES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])

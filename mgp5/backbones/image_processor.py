"""Loads the image processor of a model in its PIL form: the same pixels with torchvision installed and without."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers
from transformers.image_processing_base import ImageProcessingMixin


def load_image_processor(name: str | Path, **options: Any) -> Any:
    """Load the image processor of a folder or hub id by its class.

    `AutoImageProcessor` would do the same; but that of transformers 5.17 needs torchvision, and prefers it where it is
    installed, which resizes otherwise than PIL.

    Args:
        options: of `from_pretrained`, such as a revision.
    """
    config, _ = ImageProcessingMixin.get_image_processor_dict(name, **options)
    kind = config.get("image_processor_type", "").removesuffix("Pil").removesuffix("Fast")
    found = getattr(transformers, f"{kind}Pil", None) or transformers.AutoImageProcessor
    return found.from_pretrained(name, **options)

"""Loads what stands before an LLM: its tokenizer with a chat template, and its image processor in PIL form."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import transformers
from transformers.image_processing_base import ImageProcessingMixin
from transformers.utils import cached_file

from ..errors import Mgp5Error

TOKENIZER_PACKAGES = {"sentencepiece": "sentencepiece", "protobuf": "google.protobuf"}  # which read a tokenizer.model


def load_tokenizer(name: str | Path, **options: Any) -> Any:
    """Load the tokenizer of a folder or hub id; its chat template may stand where only processors read it.

    llava-hf keeps it in chat_template.json. `options` are those of `from_pretrained`, such as a revision.

    Raises:
        Mgp5Error: the tokenizer is a tokenizer.model alone, and packages that read one are missing.
        OSError, ValueError: as transformers raises them.
    """
    revision = options.get("revision")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, **options)
    except (ImportError, ValueError) as error:
        missing = [package for package, module in TOKENIZER_PACKAGES.items() if not _installed(module)]
        if missing and _file(name, "tokenizer.model", revision):
            case = f"the tokenizer of {name} is a tokenizer.model, expected {' and '.join(missing)} to read it"
            raise Mgp5Error(case, "pip install 'mgp5[sentencepiece]'") from error
        raise
    template = None if tokenizer.chat_template else _file(name, "chat_template.json", revision)
    if template:
        tokenizer.chat_template = json.loads(Path(template).read_text(encoding="utf-8"))["chat_template"]
    return tokenizer


def load_image_processor(name: str | Path, **options: Any) -> Any:
    """Load the image processor of a folder or hub id by its class; `options` as in `load_tokenizer`.

    `AutoImageProcessor` would do the same; but that of transformers 5.17 needs torchvision, and prefers it where it is
    installed, which resizes otherwise than PIL.
    """
    config, _ = ImageProcessingMixin.get_image_processor_dict(name, **options)
    kind = config.get("image_processor_type", "").removesuffix("Pil").removesuffix("Fast")
    found = getattr(transformers, f"{kind}Pil", None) or transformers.AutoImageProcessor
    return found.from_pretrained(name, **options)


def _file(name: str | Path, file: str, revision: str | None) -> str | None:
    return cached_file(name, file, revision=revision, _raise_exceptions_for_missing_entries=False)


def _installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # the package above it is missing
        return False

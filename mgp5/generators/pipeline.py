"""Reading the parts of a diffusers pipeline from a folder or the hub."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from ..errors import Mgp5Error
from ..hub import any_precision


def read_index(name: str, revision: str | None = None) -> dict[str, Any]:
    """Return the contents of model_index.json, which lists the parts. Raises Mgp5Error if it cannot be read."""
    hint = "give a folder or a hub id in the layout of diffusers' pipelines"
    try:
        if Path(name).is_dir():
            file = Path(name) / "model_index.json"
        else:
            from huggingface_hub import hf_hub_download

            file = hf_hub_download(str(name), "model_index.json", revision=revision)
        return json.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise Mgp5Error(f"no readable model_index.json in {name} ({_first_line(error)})", hint) from error


def load_part(load: Callable[..., Any], name: str, part: str, revision: str | None, **options: Any) -> Any:
    """Load the subfolder `part` by a `from_pretrained` or `load_config`, which gets the options.
    Raises Mgp5Error if the part is missing or cannot be read."""
    if Path(name).is_dir() and not (Path(name) / part).is_dir():
        raise Mgp5Error(f"{name} has no folder {part}, expected one for each part", "copy the whole model")
    try:
        load = partial(any_precision, load) if "use_safetensors" in options else load
        return load(str(name), subfolder=part, revision=revision, **options)
    except (OSError, ValueError, SafetensorError) as error:
        reason = _first_line(error)
        raise Mgp5Error(f"cannot load {part} of {name} ({reason})", "only safetensors weights are read") from error


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]

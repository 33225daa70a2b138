"""Data sources: each yields conversations whose last message is the target."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from ..errors import Mgp5Error
from .files import Dataset, Problems

__all__ = ["FORMATS", "Dataset", "Problems", "load_data"]


def _later(name: str) -> Callable[..., Dataset]:
    """The loader of a format; its module is imported when it is called."""

    def load(path: Path, split: str = "train", **options: Any) -> Dataset:
        loader = import_module(f"{__name__}.{name}").load
        known = list(inspect.signature(loader).parameters)[2:]
        if unknown := sorted(options.keys() - set(known)):
            hint = f"it has {', '.join(known)}" if known else "it has none"
            raise Mgp5Error(f"data of format {name} has no option {', '.join(unknown)}", hint, usage=True)
        return loader(Path(path), split, **options)

    return load


FORMATS: dict[str, Callable[..., Dataset]] = {name: _later(name) for name in ("cc3m", "vist", "mmdialog", "jsonl")}


def load_data(format: str, path: Path | str, split: str = "train", **options: Any) -> Dataset:
    """Read a data source.

    Args:
        format: a name in `FORMATS`.
        path: what `--data` was given: a folder, or the file in it that lists the samples.
        split: "train", "val" or "test"; the last two stand in for each other.
        options: those of the format's `load`.

    Raises Mgp5Error for an unknown format, split or option, and for data that cannot be used.
    """
    if format not in FORMATS:
        raise Mgp5Error(f"unknown data format {format!r}", f"expected one of {', '.join(FORMATS)}", usage=True)
    return FORMATS[format](Path(path), split, **options)

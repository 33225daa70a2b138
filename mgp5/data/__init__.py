"""Data sources: each yields conversations whose last message is the target."""

from __future__ import annotations

import inspect
from bisect import bisect_right
from collections.abc import Callable, Sequence
from importlib import import_module
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import Mgp5Error
from ..messages import Conversation
from .files import Dataset, Problems, Skipped

if TYPE_CHECKING:
    from .shards import Shards

__all__ = ["FORMATS", "Dataset", "Keyed", "Problems", "Skipped", "load_data", "options_of"]

FORMATS = ("cc3m", "vist", "mmdialog", "jsonl", "shards")


class Keyed:
    """Data sets one after another, each sample with its key, so that whoever cannot use it can say which one it is.

    Attributes:
        problems: of all of them.
    """

    def __init__(self, parts: Sequence[Dataset]) -> None:
        self.parts = tuple(parts)
        self.problems = Problems()
        for part in parts:
            self.problems.merge(part.problems)
        self._ends = list(accumulate(map(len, parts)))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> tuple[str, Conversation]:
        """Key and sample. Raises IndexError."""
        index = range(len(self))[index]
        number = bisect_right(self._ends, index)
        part = self.parts[number]
        index -= self._ends[number] - len(part)
        return part.key(index), part[index]


def _loader(format: str) -> Callable[..., Any]:
    """The `load` of a format; its module is imported now."""
    if format not in FORMATS:
        raise Mgp5Error(f"unknown data format {format!r}", f"expected one of {', '.join(FORMATS)}", usage=True)
    return import_module(f"{__name__}.{format}").load


def options_of(format: str) -> list[str]:
    """The options that `load_data` takes for a format. Raises Mgp5Error for an unknown one."""
    return list(inspect.signature(_loader(format)).parameters)[2:]


def load_data(format: str, path: Path | str, split: str = "train", **options: Any) -> Dataset | Shards:
    """Read a data source.

    Args:
        format: a name in `FORMATS`.
        path: what `--data` was given: a folder, or the file in it that lists the samples; for "shards" a URL too.
        split: "train", "val" or "test"; the last two stand in for each other.
        options: those of the format's `load`.

    Raises Mgp5Error for an unknown format, split or option, and for data that cannot be used.
    """
    load, known = _loader(format), options_of(format)
    if unknown := sorted(options.keys() - set(known)):
        hint = f"it has {', '.join(known)}" if known else "it has none"
        raise Mgp5Error(f"data of format {format} has no option {', '.join(unknown)}", hint, usage=True)
    return load(Path(path), split, **options)

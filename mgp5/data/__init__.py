"""Data sources: each yields conversations whose last message is the target. A format is a module with a `load`."""

from __future__ import annotations

import inspect
from bisect import bisect_right
from collections.abc import Callable, Sequence
from importlib import import_module
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import DataConfig
from ..errors import Mgp5Error
from ..messages import Conversation
from .files import Dataset, Problems, Skipped

if TYPE_CHECKING:
    from .shards import Shards

__all__ = ["FORMATS", "Dataset", "Keyed", "Problems", "Skipped", "Source", "load_data", "load_sources"]

# Format -> patterns of the files by which its data is recognised.
FORMATS: dict[str, tuple[str, ...]] = {
    "cc3m": ("cc3m_*.tsv",),
    "vist": ("*_cleaned.json", "*.story-in-sequence.json", "sis/*.story-in-sequence.json"),
    "mmdialog": ("*_conversations.txt", "*/*_conversations.txt"),
    "sharegpt": ("train.json", "val.json", "test.json"),
    "jsonl": ("train.jsonl", "val.jsonl", "test.jsonl"),
    "mmc4": ("docs_shard_*.jsonl", "docs_shard_*.jsonl.zip", "train/docs_shard_*"),
    "obelics": ("obelics*.jsonl", "obelics*.parquet", "train/obelics*.jsonl", "train/obelics*.parquet"),
    "shards": ("*.tar", "train/*.tar", "val/*.tar", "test/*.tar"),
    "tables": ("*.parquet", "*.arrow", "*/*.parquet", "*/*.arrow"),
}
STREAMS = ("shards", "tables")
HUB = "hf:"  # a data set of the hub
Source = tuple[str, Path]  # format, path


class Keyed:
    """Data sets one after another, each sample with its key."""

    def __init__(self, parts: Sequence[Dataset]) -> None:
        self.parts, self.problems = tuple(parts), Problems()
        for part in parts:
            self.problems.merge(part.problems)
        self._ends = list(accumulate(map(len, parts)))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> tuple[str, Conversation]:
        index = range(len(self))[index]
        number = bisect_right(self._ends, index)
        part = self.parts[number]
        index -= self._ends[number] - len(part)
        return part.key(index), part[index]


def load_data(format: str, path: Path | str, split: str = "train", **options: Any) -> Dataset | Shards:
    """Read a data source: a folder, or the file in it that lists the samples; for "shards" a URL, for "tables" hf:NAME.

    "val" and "test" stand in for each other; `options` are those of the format's `load`. Raises Mgp5Error for an
    unknown format, split or option, or data that cannot be used.
    """
    load, known = _loader(format)
    if unknown := sorted(options.keys() - {*known}):
        problem = f"data of format {format} has no option {', '.join(unknown)}"
        raise Mgp5Error(problem, f"it has {', '.join(known) or 'none'}", usage=True)
    return load(Path(path), split, **options)


def load_sources(
    sources: Sequence[Source],
    config: DataConfig,
    split: str = "train",
    *,
    count: Callable[[str], int],
    tell: Callable[[str], None] = lambda text: None,
    **of_model: Any,
) -> Keyed | Shards:
    """Read several data sources as one; each format takes the settings of `config` that it knows.

    `count` returns the number of tokens of a text, for `config.turn_tokens`; `tell` takes lines about what was skipped;
    `of_model` are options that depend on the model (narrate_from).
    Raises Mgp5Error as `load_data` does, or for shards beside another source.
    """
    if problems := check_sources(sources):
        raise Mgp5Error("; ".join(problems), usage=True)
    settings = {**vars(config), "count": count, **of_model}
    parts = []
    for format, path in sources:
        options = {name: settings[name] for name in _loader(format)[1] if name in settings}
        parts.append(load_data(format, path, split, **options))
        if parts[-1].problems:
            tell(f"{path}: skipped {parts[-1].problems}")
    return parts[0] if sources[0][0] in STREAMS else Keyed(parts)


def find_format(path: Path) -> str:
    """Return the format of the data at a path, by the names of its files. Raises Mgp5Error where it is not clear."""
    if str(path).startswith(HUB):
        return "tables"
    if not path.exists() and not path.name.endswith(".tar"):
        raise Mgp5Error(f"no data at {path}", "check the path", usage=True)
    if path.is_dir():
        found = [format for format, patterns in FORMATS.items() if any(any(path.glob(p)) for p in patterns)]
    else:
        named = [format for format, patterns in FORMATS.items() if any(map(path.match, patterns))]
        found = named or [format for format, (first, *_) in FORMATS.items() if path.suffix == Path(first).suffix][:1]
    if len(found) > 1:
        found = [format for format in found if format != "tables"]  # whose files may have any name
    if len(found) != 1:
        names = ", ".join(pattern for patterns in FORMATS.values() for pattern in patterns[:1])
        what = f"{path} holds data of the formats {' and '.join(found)}" if found else f"{path} holds none of {names}"
        raise Mgp5Error(what, f"give --format: one of {', '.join(FORMATS)}", usage=True)
    return found[0]


def check_sources(sources: Sequence[Source]) -> list[str]:
    """Return what is wrong with formats and paths of data sources, without reading them; one entry each."""
    problems = [] if sources else ["there is no data: give --data PATH with its --format"]
    for format, path in sources:
        if format not in FORMATS:
            problems.append(f"unknown data format {format!r}: expected one of {', '.join(FORMATS)}")
        elif format != "shards" and not (path.exists() or (format == "tables" and str(path).startswith(HUB))):
            problems.append(f"no data at {path}: check the path")
    if len(sources) > 1 and (streams := [format for format, _ in sources if format in STREAMS]):
        problems.append(f"{streams[0]} are a stream and go with no other --data: give all as one: {{00000..00331}}")
    return problems


def _loader(format: str) -> tuple[Callable[..., Any], list[str]]:
    """Import a format; return its `load` and the names of its options: fields of OPTIONS, where it has that, else what
    `load` takes. Raises Mgp5Error for an unknown format."""
    if format not in FORMATS:
        raise Mgp5Error(f"unknown data format {format!r}", f"expected one of {', '.join(FORMATS)}", usage=True)
    module = import_module(f"{__name__}.{format}")
    names = inspect.signature(getattr(module, "OPTIONS", module.load)).parameters
    return module.load, [name for name in names if name not in ("path", "split")]

"""Captioned images in tables as Hugging Face's `datasets` has them (extra `datasets`): a folder of parquet or arrow
files, or a data set of the hub, "hf:OWNER/NAME" or "hf:OWNER/NAME/CONFIGURATION".

A shard is a row group of a parquet file or an arrow file. It is read when its turn comes: nothing is downloaded or
converted as a whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..errors import Mgp5Error
from .cc3m import Captions, captions_of, clean_caption
from .files import Skipped, split_names
from .shards import Sample, Shards, captioned, check_stream

HUB, CONVERTED = "hf:", "refs/convert/parquet"  # the branch in which the hub keeps data sets of other formats
USUAL = {"image": ("image", "jpg", "img", "pixels"), "caption": ("caption", "text", "txt", "description")}
READERS = 16  # of footers at once: a large data set has hundreds of files


class Tables(Shards):
    """The row groups of tables as shards; their numbers of rows stand in the files' footers."""

    def __init__(self, groups: Sequence[tuple[str, int]], captions: Captions) -> None:
        super().__init__([name for name, _ in groups], captions)
        self._rows = dict(groups)

    @property
    def size(self) -> int:
        """Number of samples of an epoch."""
        return sum(map(self.size_of, self.names))

    def size_of(self, name: str) -> int:
        """Return how many samples a row group has."""
        return self._captions.count(self._rows[name])

    def open(self, name: str) -> closing[Table]:
        """Return a context manager that gives the samples of a row group."""
        return closing(Table(name, self._rows[name], self._captions))


class Table:
    """The samples of a row group by number; a lost one is a `Skipped`."""

    def __init__(self, name: str, rows: int, captions: Captions) -> None:
        self.name, self._captions, self._lost = name, captions, ""
        self._samples = [(row, again) for row in range(rows) for again in captions.numbers(row + 1)]
        try:
            self._table = _read(name, [captions.image_column, captions.caption_column])
        except (OSError, ValueError) as error:  # those of pyarrow are ValueErrors
            self._lost = str(error)

    def __len__(self) -> int:
        return len(self._samples)

    def sample(self, number: int) -> Sample:
        """Return a sample with its key, or why there is none."""
        row, again = self._samples[number]
        if self._lost:
            return Skipped("broken shard", f"{self.name} ({self._lost})")
        key = f"{Path(self.name).name}/{row}"
        (values,) = self._table.slice(row, 1).to_pylist()
        image, caption = values[self._captions.image_column], values[self._captions.caption_column]
        data = image.get("bytes") if isinstance(image, dict) else image
        if not isinstance(data, bytes) or not data:
            return Skipped("missing image", f"{key} has no bytes in {self._captions.image_column}")
        texts = caption if isinstance(caption, list) else [caption]  # some have several of one image
        caption = next(filter(None, (clean_caption(text) for text in texts if isinstance(text, str))), "")
        if not caption:
            return Skipped("no caption", f"{key} has no text in {self._captions.caption_column}")
        return captioned(self._captions, key, data, caption, again)

    def close(self) -> None:
        self._table = None


OPTIONS = Captions


def load(path: Path, split: str = "train", **options: Any) -> Tables:
    """Find the tables of a folder or of the hub, and check that one of their rows is usable. Raises Mgp5Error.

    Options are those of `Captions`; the columns are by default the first of USUAL that is there. Images are bytes,
    alone or as `datasets.Image` stores them.
    """
    captions = captions_of(split, options)
    _check_library(path)
    import datasets

    datasets.disable_progress_bars()
    files = _find(str(path), split)
    try:
        with ThreadPoolExecutor(READERS) as pool:
            groups = [group for found in pool.map(_groups, files) for group in found]
        names = _columns(files[0])
    except (OSError, ValueError) as error:
        raise Mgp5Error(f"a table of {path} cannot be read ({error})", "copy it again, or try again later") from None
    asked = {"image": captions.image_column, "caption": captions.caption_column}
    columns = {
        f"{kind}_column": asked[kind] or next((name for name in usual if name in names), "")
        for kind, usual in USUAL.items()
    }
    if not {*columns.values()} <= {*names}:
        found = f"{files[0]} has the columns {', '.join(names)}"
        raise Mgp5Error(found, "say which hold what: --columns caption=NAME,image=NAME", usage=True)
    return check_stream(Tables(groups, replace(captions, **columns)))


def rows(file: Path, columns: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the rows of a parquet file, each behind "name:number"; of columns that it has not there is nothing.

    Raises Mgp5Error for a file that cannot be read.
    """
    _check_library(file)
    number = 0
    try:
        names = [name for name in columns if name in _columns(str(file))]
        for group, _ in _groups(str(file)):
            for batch in _read(group, names).to_batches(max_chunksize=1000):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{file.name}:{number}", row
    except (OSError, ValueError) as error:
        raise Mgp5Error(f"{file} cannot be read ({error})", "copy it again") from None


def _check_library(path: Path) -> None:
    if find_spec("datasets") is None:
        raise Mgp5Error(f"--data {path} needs the library datasets", "pip install 'mgp5[datasets]'", usage=True)


def _find(path: str, split: str) -> list[str]:
    """Return the parquet or arrow files of a split, in order. Raises Mgp5Error where there is none."""
    splits, folder = split_names(split), Path(path)
    if folder.is_file():
        return [path]
    for place in (folder, *(folder / name for name in splits)):  # as `save_to_disk` writes them
        if arrows := sorted(map(str, place.glob("*.arrow"))):
            return arrows
    by_split = _by_builder(path)
    names = [name if name != "val" else "validation" for name in splits]
    for name in names:
        if files := [str(file) for file in by_split.get(name, ()) if str(file).endswith((".parquet", ".arrow"))]:
            return files
    found = f"{path} has the splits {', '.join(by_split)} of tables" if by_split else f"{path} has no tables"
    raise Mgp5Error(f"{found}, expected parquet or arrow files of {names[0]}", "check the path", usage=True)


def _by_builder(path: str) -> dict[str, Sequence[str]]:
    """Return the files of each split, found by `datasets`. Raises Mgp5Error."""
    from datasets import load_dataset_builder

    at_hub, parts = path.startswith(HUB), path.removeprefix(HUB).split("/")
    names = ["/".join(parts[:2]), *parts[2:3]] if at_hub else ["parquet"]  # of the repository and the configuration
    try:
        files = load_dataset_builder(*names, **({} if at_hub else {"data_dir": path})).config.data_files or {}
        if at_hub and not any(str(file).endswith(".parquet") for each in files.values() for file in each):
            files = load_dataset_builder(*names, revision=CONVERTED).config.data_files or {}
    except (OSError, ValueError, RuntimeError) as error:  # datasets' own errors are FileNotFoundErrors
        reason = str(error).strip().partition("\n")[0]
        raise Mgp5Error(f"no data set at {path} ({reason})", "check its name, as hf:OWNER/NAME", usage=True) from None
    return {str(split): each for split, each in files.items()}


def _open(file: str) -> Any:
    """Open a local or remote file; of a remote one only what is read is fetched."""
    import fsspec

    return fsspec.open(file, "rb").open()


def _groups(file: str) -> list[tuple[str, int]]:
    """Return name and number of rows of each row group of a file. Raises OSError, ValueError."""
    if file.endswith(".arrow"):
        from datasets import Dataset

        return [(f"{file}#0", len(Dataset.from_file(file)))]
    from pyarrow.parquet import ParquetFile

    with _open(file) as source:
        metadata = ParquetFile(source).metadata
        return [(f"{file}#{number}", metadata.row_group(number).num_rows) for number in range(metadata.num_row_groups)]


def _columns(file: str) -> list[str]:
    if file.endswith(".arrow"):
        from datasets import Dataset

        return Dataset.from_file(file).column_names
    from pyarrow.parquet import ParquetFile

    with _open(file) as source:
        return ParquetFile(source).schema_arrow.names


def _read(name: str, columns: list[str]) -> Any:
    """Return a row group as a table of pyarrow; that of an arrow file is mapped. Raises OSError, ValueError."""
    file, _, number = name.rpartition("#")
    if file.endswith(".arrow"):
        from datasets import Dataset

        return Dataset.from_file(file).data.select(columns)
    from pyarrow.parquet import ParquetFile

    with _open(file) as source:
        return ParquetFile(source).read_row_group(int(number), columns=columns)

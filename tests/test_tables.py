"""Tables of `datasets`: samples, columns, order and resuming are those of shards, over real parquet and arrow files."""

import io
import json
import shutil
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import CliRunner
from tiny import picture
from torch.utils.data import DataLoader

from mgp5.cli import main
from mgp5.data import Skipped, find_format, load_data, tables
from mgp5.errors import Mgp5Error
from mgp5.hub import DEMO

datasets = pytest.importorskip("datasets", reason="datasets is not installed")
ROWS, GROUP = 10, 4  # of a file


def png(color: str) -> bytes:
    file = io.BytesIO()
    picture(color).save(file, "png")
    return file.getvalue()


def rows(first: int, image: str = "image", caption: str = "caption") -> datasets.Dataset:
    values = [{"path": f"{i}.png", "bytes": png("red" if i % 2 else "blue")} for i in range(first, first + ROWS)]
    texts = [f"A fox, #{i}." for i in range(first, first + ROWS)]
    data = datasets.Dataset.from_dict({image: values, "n": [*range(ROWS)], caption: texts})
    return data.cast_column(image, datasets.Image())


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def parquet(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("parquet")
    for number in range(2):
        rows(ROWS * number).to_parquet(folder / f"train-{number:05d}-of-00002.parquet", batch_size=GROUP)
    rows(90).to_parquet(folder / "validation-00000-of-00001.parquet")
    return folder


@pytest.fixture(scope="module")
def arrow(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("arrow") / "saved"
    datasets.concatenate_datasets([rows(0), rows(ROWS)]).save_to_disk(folder, num_shards=2)
    return folder


def keys(items) -> list[str]:
    return [f"{item.kind}!" if isinstance(item, Skipped) else item[0] for item in items]


def batches(data, count, workers=0, first=0, rank=0, world=1):
    stream = data.stream(rank=rank, world=world, batch=2, first=first, seed=5)
    return [keys(each) for each in islice(DataLoader(stream, 2, num_workers=workers, collate_fn=list), count)]


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_samples_are_captions_and_images_of_the_split(kind, request):
    folder = request.getfixturevalue(kind)
    assert find_format(folder) == "tables"
    data = load_data("tables", folder, instruct_every=4)
    found = [*data]
    assert data.size == len(found) == 20 + sum(key.endswith("#instruction") for key, _ in found) > 20
    plain = {key: sample for key, sample in found if not key.endswith("#instruction")}
    assert [sample.messages[-1].images[0].caption for sample in plain.values()] == [f"a fox, {i}" for i in range(20)]
    colors = [sample.messages[-1].images[0].load().getpixel((0, 0)) for sample in plain.values()]
    assert colors == [(0, 0, 255), (255, 0, 0)] * 10
    assert len(data.names) == (6 if kind == "parquet" else 2)  # row groups, files


def test_other_splits_and_single_files(parquet):
    assert next(iter(load_data("tables", parquet, "val")))[1].messages[-1].images[0].caption == "a fox, 90"
    assert load_data("tables", parquet / "train-00001-of-00002.parquet", instruct_every=0).size == ROWS


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
@pytest.mark.parametrize("workers", [0, 2])
def test_streams_resume_at_the_sample_and_share_all_out(kind, workers, request):
    data = load_data("tables", request.getfixturevalue(kind), instruct_every=0)
    whole = batches(data, 12, workers, rank=1, world=2)
    for first in (1, 4, 7):
        assert batches(data, 3, workers, first, rank=1, world=2) == whole[first : first + 3]
    epoch = [key for batch in batches(data, 10) for key in batch]
    assert sorted(epoch) == sorted(keys(data)) and epoch != keys(data)


def test_only_the_row_groups_of_a_reader_are_read(parquet, monkeypatch):
    data, read, seen = load_data("tables", parquet, instruct_every=0), tables._read, []
    monkeypatch.setattr(tables, "_read", lambda name, columns: seen.append((name, columns)) or read(name, columns))
    assert len(batches(data, 1, first=9)[0]) == 2
    assert len(seen) == 1 and seen[0][1] == ["image", "caption"]


def test_own_columns_are_named(tmp_path):
    rows(0, "IMG", "TEXT").to_parquet(tmp_path / "train.parquet")
    with pytest.raises(Mgp5Error, match=r"has the columns IMG, n, TEXT.*--columns caption=NAME,image=NAME"):
        load_data("tables", tmp_path)
    data = load_data("tables", tmp_path, caption_column="TEXT", image_column="IMG")
    assert next(iter(data))[1].messages[-1].images[0].caption == "a fox, 0"


def test_what_is_wrong_is_told_and_the_stream_goes_on(tmp_path, parquet):
    columns = {"image": [png("red"), None, b"", png("red")], "caption": [["", "Two."], ["a"], ["b"], None]}
    datasets.Dataset.from_dict(columns).to_parquet(tmp_path / "train.parquet")
    found = keys(load_data("tables", tmp_path, instruct_every=0))
    assert found == ["train.parquet#0/0", "missing image!", "missing image!", "no caption!"]
    shutil.copytree(parquet, tmp_path / "copy")
    data = load_data("tables", tmp_path / "copy", instruct_every=0)
    (tmp_path / "copy/train-00000-of-00002.parquet").unlink()
    assert keys(data)[:ROWS] == ["broken shard!"] * ROWS and len([*data]) == data.size
    (tmp_path / "copy/train-00001-of-00002.parquet").write_bytes(b"PAR1 no")
    for wrong, split in ((tmp_path / "copy", "train"), (tmp_path / "copy", "most"), (tmp_path / "none", "train")):
        with pytest.raises(Mgp5Error):
            load_data("tables", wrong, split)


def test_the_hubs_data_sets_are_found_by_name(monkeypatch, parquet):
    """By the builder of `datasets`; one of another format in the branch that the hub converts to."""
    asked, real = [], datasets.load_dataset_builder

    texts = SimpleNamespace(config=SimpleNamespace(data_files={"train": ["hf://datasets/a/b@main/data.csv"]}))

    def builder(*names, **options):
        asked.append((names, options))
        return texts if not options else real("parquet", data_dir=str(parquet))

    monkeypatch.setattr(datasets, "load_dataset_builder", builder)
    assert find_format(Path("hf:a/b/c")) == "tables"
    assert load_data("tables", Path("hf:a/b/c"), instruct_every=0).size == 20
    assert asked == [(("a/b", "c"), {}), (("a/b", "c"), {"revision": "refs/convert/parquet"})]


def test_a_run_trains_on_tables(tmp_path, monkeypatch):
    rows(0, "IMG", "TEXT").to_parquet(tmp_path / "train.parquet")
    command = ["train", "--stage", "pretrain", "--model", f"{DEMO}/mllm+{DEMO}/diffusion", "--data", str(tmp_path)]
    command += ["--out", str(tmp_path / "run"), "--columns", "caption=TEXT,image=IMG", "--dry-run", "--json"]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["samples"] == ROWS
    wrong = CliRunner().invoke(main, [*command, "--columns", "picture=IMG"])
    assert wrong.exit_code == 2 and "expected caption=NAME,image=NAME" in wrong.output

"""CC3M: cleaned captions, instructions, and the tables that people have."""

from dataclasses import replace
from pathlib import Path

import pytest
from test_data import roles, touch, write_cc3m

from mgp5.data import cc3m, load_sources
from mgp5.errors import Mgp5Error
from mgp5.messages import Image
from mgp5.prompts import CAPTION_INSTRUCTIONS, CAPTION_SYSTEM
from mgp5.training.presets import preset


def test_cc3m_cleans_and_counts(tmp_path: Path) -> None:
    rows = (
        'A "Big" dog; (brown) #1: runs * ~ fast!\ttrain/0.jpg',
        '"say ""hi"" now."\t"train/1.jpg"',
        "no picture\ttrain/9.jpg",
        "one field",
        "...\ttrain/2.jpg",
        "strange\ttrain/\0.jpg",
    )
    data = cc3m.load(write_cc3m(tmp_path, *rows))
    assert data.problems == {"missing image": 2, "bad row": 2}
    assert str(data.problems).startswith("2 x missing image (first: cc3m_train.tsv:4 train/9.jpg); ")
    assert [data[index].messages[0].text for index in (0, 1)] == ["a big dog brown 1 runs fast", "say hi now"]
    assert data[0].messages[-1].content == (Image(tmp_path / "train/0.jpg", caption="a big dog brown 1 runs fast"),)
    assert roles(data[0]) == ["user", "assistant"]


@pytest.mark.parametrize(
    ("rows", "captions", "problems"),
    [
        (['"a blue', 'square"\ttrain/1.jpg'], ["a blue square"], {}),  # as the csv module writes a newline
        (['"a\tblue square"\ttrain/1.jpg'], ["a blue square"], {}),
        (['"a blue', "a red one\ttrain/1.jpg"], ["a red one"], {"bad row": 1}),  # a quote that nothing closes
        (['"a blue'], [], {"bad row": 1}),
        (['a 12" record\ttrain/1.jpg', '"odd\ttrain/2.jpg'], ["a 12 record", "odd"], {}),
        (["nan\ttrain/1.jpg", "NULL.\ttrain/2.jpg"], [], {"bad row": 2}),
    ],
)
def test_cc3m_rows_are_those_of_the_csv_module(rows, captions, problems, tmp_path: Path) -> None:
    data = cc3m.load(write_cc3m(tmp_path, "a dog\ttrain/0.jpg", *rows, "a cat\ttrain/3.jpg"))
    assert [sample.messages[0].text for sample in data] == ["a dog", *captions, "a cat"] and data.problems == problems


@pytest.mark.parametrize("stage, name, bare", [("pretrain", "paper", True), ("pretrain", "demo", False)])
def test_the_papers_ask_with_the_bare_caption(stage, name, bare, tmp_path: Path) -> None:
    folder = write_cc3m(tmp_path, "a dog\ttrain/0.jpg", "a cat\ttrain/1.jpg")
    data = load_sources([("cc3m", folder)], replace(preset(stage, name).data, instruct_every=2), count=len)
    assert [sample.bare for _, sample in data] == [bare, bare, False]  # an instruction is a turn of a dialogue


def test_cc3m_columns_are_named(tmp_path: Path) -> None:
    touch(tmp_path, "0.jpg")
    (tmp_path / "cc3m_train.tsv").write_text("Text \t IMAGE\nA dog\t0.jpg\n")
    with pytest.raises(Mgp5Error, match=r"\['text', 'image'\].*set data.caption_column and data.image_column"):
        cc3m.load(tmp_path)
    assert cc3m.load(tmp_path, caption_column="text", image_column="Image")[0].messages[0].text == "a dog"


def test_cc3m_instructions_follow_every_nth_row(tmp_path: Path) -> None:
    folder = write_cc3m(tmp_path, *(f"row {n}\ttrain/{n}.jpg" for n in (0, 1, 2, 3)))
    assert len(cc3m.load(folder)) == len(cc3m.load(folder, instruct_every=0)) == 4
    data = cc3m.load(folder / "cc3m_train.tsv", instruct_every=3)
    keys = [data.key(index).removeprefix("train/") for index in range(5)]
    assert keys == ["0.jpg", "1.jpg", "2.jpg", "2.jpg#instruction", "3.jpg"]
    assert roles(data[3]) == ["system", "user", "assistant"] and data[3].messages[0].text == CAPTION_SYSTEM
    prompt = data[3].messages[1].text
    assert prompt.removesuffix(" row 2") in CAPTION_INSTRUCTIONS and len(CAPTION_INSTRUCTIONS) == 7
    assert data[3].messages[-1] == data[2].messages[-1]
    seeds = {cc3m.load(folder, instruct_every=3, seed=seed)[3].messages[1].text for seed in range(50)}
    assert len(seeds) == 7
    (folder / "cc3m_train.tsv").rename(folder / "cc3m_val.tsv")
    assert len(cc3m.load(folder, "val", instruct_every=1)) == 4  # evaluation sees each picture once


def test_cc3m_refuses_another_header_and_an_empty_table(tmp_path: Path) -> None:
    (tmp_path / "cc3m_train.tsv").write_text("A dog.\ttrain/0.jpg\n")
    with pytest.raises(Mgp5Error, match=r"cc3m_train.tsv begins with the columns .*a dog"):
        cc3m.load(tmp_path)
    write_cc3m(tmp_path, "gone\ttrain/7.jpg")
    with pytest.raises(Mgp5Error, match=r"no usable sample: skipped: 1 x missing image \(first: cc3m_train.tsv:2"):
        cc3m.load(tmp_path)

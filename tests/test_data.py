"""Data sources: counts, roles, order, targets, and what happens to files that are missing, malformed or hostile."""

import json
import pickle
from pathlib import Path

import pytest

from mgp5.config import DataConfig
from mgp5.data import FORMATS, STREAMS, Keyed, cc3m, find_format, jsonl, load_data, load_sources, mmdialog
from mgp5.errors import Mgp5Error
from mgp5.messages import Conversation, Image
from mgp5.prompts import CHAT_SYSTEM

REAL = Path(__file__).resolve().parents[2] / "shared/data/real"
BY_NUMBER = [name for name in FORMATS if name not in (*STREAMS, "mmc4", "obelics", "sharegpt")]  # others have own tests
needs_real = pytest.mark.skipif(not REAL.is_dir(), reason="the real samples are not beside this repository")


def touch(folder: Path, *names: str) -> None:
    """Empty files: the loaders look whether a picture exists and leave its pixels for later."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def write_cc3m(folder: Path, *rows: str, split: str = "train") -> Path:
    touch(folder, "train/0.jpg", "train/1.jpg", "train/2.jpg", "train/3.jpg")
    (folder / f"cc3m_{split}.tsv").write_text("\r\n".join(("caption\timage_path", *rows)))
    return folder


def write_vist(folder: Path, stories: dict, mapping: dict | None = None) -> Path:
    touch(folder, *(f"images/{number}.jpg" for number in range(5)))
    mapping = mapping or {str(number): f"images/{number}.jpg" for number in range(5)}
    (folder / "train_cleaned.json").write_text(json.dumps(stories))
    (folder / "train_image_mapping.json").write_text(json.dumps(mapping))
    return folder


def story(length: int = 5) -> list[dict]:
    steps = [{"caption": f"step {n}", "image_id": str(n), "sequence_index": n} for n in range(length)]
    return steps[::-1]  # the order in the file does not count


def write_dialogs(folder: Path, *dialogs: list, split: str = "train") -> Path:
    touch(folder / split, "1.jpg", "-2.jpg")
    rows = [
        json.dumps({"conversation_id": n, "conversation": [{"turn": turn} for turn in turns]})
        for n, turns in enumerate(dialogs)
    ]
    (folder / split / f"{split}_conversations.txt").write_text("\n".join(rows))
    return folder


def said(text: str = "", *media: str | int) -> list[dict]:
    return ([{"__TEXT__": text}] if text else []) + [{"__MEDIA__": name} for name in media]


def write_jsonl(folder: Path, *rows: object) -> Path:
    touch(folder, "a.png")
    file = folder / "train.jsonl"
    file.write_text("\n".join(row if isinstance(row, str) else json.dumps({"messages": row}) for row in rows))
    return file


def chat(*paths: str) -> list[dict]:
    return [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": [{"type": "image", "path": path} for path in paths]},
    ]


def roles(conversation: Conversation) -> list[str]:
    return [message.role for message in conversation.messages]


def shape(conversation: Conversation) -> list[str]:
    """Parts of the last two messages: t = text, i = image."""
    return ["".join("ti"[isinstance(part, Image)] for part in m.content) for m in conversation.messages[-2:]]


@needs_real
@pytest.mark.parametrize(
    ("format", "folder", "lengths"),
    [
        ("cc3m", "CC3M", [2] * 2),
        ("vist", "VIST", [3] * 13),
        ("mmdialog", "MMDialog", [3, 5, 7, 9]),
        ("mmdialog", "MMDialog/test", [3, 5, 7, 9]),
        ("mmdialog", "MMDialog/test/test_conversations.txt", [3, 5, 7, 9]),
    ],
)
def test_real_data(format: str, folder: str, lengths: list[int]) -> None:
    data = load_data(format, REAL / folder, "test")  # of CC3M and VIST there is only val, which stands in
    assert [len(sample.messages) for sample in data] == lengths and data.problems == {}
    assert all(image.load().mode == "RGB" for sample in data for image in sample.images)
    if format == "cc3m":
        assert data[0].messages[0].text == "burning candle on the background of the aquarium with small fish"
        assert data[1].images[0].caption == "shot of the full tree" and data.key(1) == "val/000009256.jpg"
    elif format == "vist":
        assert [image.path.stem[-1] for image in data[11].images] == list("57340")
    else:
        assert shape(data[0]) == ["ti", "ti"] and shape(data[2]) == ["t", "t"]
        assert len(load_data("mmdialog", REAL / folder, "test", user_targets=True)) == 8


def make(format: str, folder: Path) -> Path:
    return {
        "cc3m": lambda: write_cc3m(folder, "A dog.\ttrain/0.jpg", "Two.\ttrain/1.jpg"),
        "vist": lambda: write_vist(folder, {"s": story(), "r": story(3)}),
        "mmdialog": lambda: write_dialogs(folder, [said("hi", 1), said("", "-2"), said("ok"), said("bye", "1", "-2")]),
        "jsonl": lambda: write_jsonl(folder, chat("a.png"), [*chat(), *chat("a.png")]),
    }[format]()


@pytest.mark.parametrize("format", BY_NUMBER)
def test_every_sample_ends_with_the_assistant(format: str, tmp_path: Path) -> None:
    data = load_data(format, make(format, tmp_path))
    samples = list(data)
    assert len(samples) == len(data) > 0 and data[-1] == samples[-1]
    keys = [data.key(index) for index in range(len(data))]
    assert len(set(keys)) == len(keys)
    for sample in samples:
        assert sample.messages[-1].role == "assistant" and sample.messages[-1].content
        assert sample.messages[-2].role == "user"
        assert all(image.path.is_file() for image in sample.images)
    copy = pickle.loads(pickle.dumps(data))  # as DataLoader workers get it
    assert list(copy) == samples and copy.problems == data.problems


NAMES = {"cc3m": "cc3m_val.tsv", "vist": "val_cleaned.json", "mmdialog": "val/val_conv.*.txt", "jsonl": "val.jsonl"}


@pytest.mark.parametrize(("format", "expected"), NAMES.items())
def test_missing_file_is_named(format: str, expected: str, tmp_path: Path) -> None:
    with pytest.raises(Mgp5Error, match=expected):
        load_data(format, tmp_path, "val")


def test_wrong_names_are_usage_errors(tmp_path: Path) -> None:
    for call in (
        lambda: load_data("parquet", tmp_path),
        lambda: load_data("cc3m", tmp_path, "dev"),
        lambda: load_data("cc3m", tmp_path, tasks=("narrate",)),
        lambda: load_data("vist", tmp_path, tasks=("draw",)),
        lambda: load_data("vist", tmp_path, context="half"),
        lambda: load_data("mmdialog", tmp_path, history=-1),
        lambda: load_data("mmdialog", tmp_path, turn_tokens=50),
        lambda: load_data("mmdialog", tmp_path, turn_tokens=0, count=len),
    ):
        with pytest.raises(Mgp5Error) as caught:
            call()
        assert caught.value.exit_code == 2 and caught.value.hint


@pytest.mark.parametrize("name", ["../out.jpg", "/etc/passwd", "a/../../out.jpg", "..", "link.jpg", "far/out.jpg"])
@pytest.mark.parametrize("format", BY_NUMBER)
def test_pictures_outside_the_folder_are_refused(format: str, name: str, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    touch(tmp_path, "out.jpg", "out/out.jpg")
    base = folder / "train" if format == "mmdialog" else folder
    base.mkdir(parents=True)
    (base / "link.jpg").symlink_to(tmp_path / "out.jpg")
    (base / "far").symlink_to(tmp_path / "out")
    if format == "mmdialog" and name == "..":
        pytest.skip("a suffix is added: the name of a file in the folder")
    with pytest.raises(Mgp5Error, match=r"(train|story|s).*leaves its folder"):
        if format == "cc3m":
            load_data(format, write_cc3m(folder, "ok\ttrain/0.jpg", f"bad\t{name}"))
        elif format == "vist":
            load_data(format, write_vist(folder, {"s": story()}, {str(n): name for n in range(5)}))
        elif format == "mmdialog":
            load_data(format, write_dialogs(folder, [said("hi"), said("", name.removesuffix(".jpg"))]))
        else:
            load_data(format, write_jsonl(folder, chat("a.png"), chat(name)))


def test_mmdialog_roles_order_and_pictures(tmp_path: Path) -> None:
    turns = [said("hi", 1), said("", "-2"), said("so?"), said("see", "1", "-2")]
    data = mmdialog.load(write_dialogs(tmp_path, turns))
    assert [data.key(index) for index in range(2)] == ["0/1", "0/3"]
    assert roles(data[0]) == ["system", "user", "assistant"] and shape(data[0]) == ["ti", "i"]
    assert roles(data[1]) == ["system", "user", "assistant", "user", "assistant"] and shape(data[1]) == ["t", "tii"]
    assert data[1].messages[0].text == CHAT_SYSTEM and CHAT_SYSTEM.endswith("with appropriate images.")
    assert [image.path.name for image in data[1].images] == ["1.jpg", "-2.jpg", "1.jpg", "-2.jpg"]


def test_mmdialog_history_and_user_targets(tmp_path: Path) -> None:
    folder = write_dialogs(tmp_path, [said(str(n)) for n in range(5)], [said("alone")])
    data = mmdialog.load(folder, history=1)
    assert [[m.text for m in sample.messages[1:]] for sample in data] == [["0", "1"], ["2", "3"]]
    assert roles(mmdialog.load(folder, history=0)[0]) == ["system", "assistant"]
    data = mmdialog.load(folder, user_targets=True)
    assert [sample.messages[-1].text for sample in data] == ["1", "2", "3", "4"]
    assert roles(data[1]) == ["system", "assistant", "user", "assistant"]


def test_mmdialog_ends_before_a_long_turn(tmp_path: Path) -> None:
    talk = [said("one two"), said("three", 1), said("four five six"), said("seven"), said("x" * 90), said("end")]
    folder = write_dialogs(tmp_path, talk, [said("half \ud800 a character"), said("b")])
    counted: list[str] = []
    data = mmdialog.load(folder, turn_tokens=2, count=lambda text: counted.append(text) or len(text.split()))
    assert [data.key(index) for index in range(len(data))] == ["0/1"] and counted[-1] == "half ? a character"
    assert data.problems == {"long turn": 2} and data.problems.first["long turn"] == "train_conversations.txt:1 turn 2"
    data = mmdialog.load(folder, turn_tokens=10, count=lambda text: counted.append(text) or len(text.split()))
    assert len(data) == 4 and not data.problems


def test_mmdialog_counts_what_it_skips(tmp_path: Path) -> None:
    gone = [said("a"), said("b"), said("c"), said("d", "99"), said("e"), said("f")]
    empty = [said("a"), said("b"), said(" "), said("d")]
    write_dialogs(tmp_path, gone, empty, [said("a"), [{"__SOUND__": "x"}]], [said("a"), ["x"]], [said("a"), "x"])
    file = tmp_path / "train/train_conversations.txt"
    file.write_bytes(file.read_bytes() + b'\n{"conversation": [\n[]\n\n{"conversation": [3]}\n"\xff"\n')
    data = mmdialog.load(tmp_path)
    assert data.problems == {"missing image": 1, "bad turn": 4, "bad row": 4}
    assert data.problems.first["bad row"] == "train_conversations.txt:6" and len(data) == 2


def test_jsonl_one_sample_per_answer(tmp_path: Path) -> None:
    talk = [{"role": "system", "content": "be kind"}, *chat("a.png"), *chat("a.png", "a.png")]
    data = jsonl.load(write_jsonl(tmp_path, talk))
    assert len(data) == 2 and [len(sample.messages) for sample in data] == [3, 5]
    assert shape(data[1]) == ["t", "ii"] and data[1].images[0].path == tmp_path / "a.png"
    assert data.key(1) == "train.jsonl:1/4"


def test_jsonl_learns_a_story_by_the_tasks_of_vist(tmp_path: Path) -> None:
    story = json.dumps({"story": [{"text": text, "path": "a.png"} for text in ("One.", "Two.")]})
    data = jsonl.load(write_jsonl(tmp_path, chat("a.png"), story))
    assert [data.key(index) for index in range(1, 5)] == [f"train.jsonl:2/{number}" for number in range(4)]
    targets = [sample.messages[-1] for sample in map(data.__getitem__, range(1, 5))]
    assert [(message.text, len(message.images)) for message in targets] == [("", 1), ("", 1), ("Two.", 1), ("Two.", 0)]
    assert [len(sample.images) for sample in map(data.__getitem__, range(1, 5))] == [1, 2, 2, 2]
    assert data[2].images[0].path == tmp_path / "a.png" and "One." in data[2].messages[1].text


def test_jsonl_stories_are_asked_as_those_of_vist(tmp_path: Path) -> None:
    scenes = [{"text": f"Scene {n}.", "path": "a.png"} for n in range(3)]
    path = write_jsonl(tmp_path, json.dumps({"story": scenes}), chat("a.png"))
    data = jsonl.load(path, narrate_first=True, narrate_from="none")
    assert len(data) == 3 + 2 + 3 + 1 and data.key(0) == "train.jsonl:1/0" and not data.problems
    assert [len(sample.images) for sample in data] == [1, 1, 2, 2, 1, 3, 3, 1, 1]  # narrations without history
    assert data[1].messages[-1].text == "Scene 0." and data[4].messages[-1].text == "Scene 1."


@pytest.mark.parametrize("format", [*BY_NUMBER, *STREAMS])
def test_the_format_is_found_by_the_files(format: str, tmp_path: Path) -> None:
    if format in STREAMS:
        touch(tmp_path, "00000.tar" if format == "shards" else "train/0000.parquet")
    else:
        make(format, tmp_path)
    touch(tmp_path, "x.jsonl")  # as `mgp5 data storyland` writes one beside each format
    assert find_format(tmp_path) == format
    touch(tmp_path, "train.jsonl", "cc3m_val.tsv")
    with pytest.raises(Mgp5Error, match=r"of the formats .* and .*: give --format"):
        find_format(tmp_path)
    assert find_format(tmp_path / "x.jsonl") == "jsonl"
    with pytest.raises(Mgp5Error, match="no data at"):
        find_format(tmp_path / "gone")


def test_jsonl_counts_what_it_skips(tmp_path: Path) -> None:
    late = [*chat("a.png"), *chat("gone.png"), *chat("a.png")]
    data = jsonl.load(write_jsonl(tmp_path, late, chat("gone.png"), chat(), chat()[:1], [], chat()[1:]))
    assert len(data) == 1 and data.problems == {"missing image": 2, "no answer": 4}


@pytest.mark.parametrize(
    "row",
    [
        "{",
        '"\\ud800',
        "[]",
        "{}",
        '{"messages": 1}',
        '{"messages": [], "messages": []}',
        '{"messages": [], "story": []}',
        '{"story": [{"text": "One.", "text": "Two.", "path": "a.png"}]}',
        '{"messages": ["x"]}',
        '{"story": []}',
        '{"story": [{"text": "One."}]}',
        '{"story": [{"text": "One.", "path": "gone.png"}]}',
        '{"story": [{"text": "One.", "path": "../a.png"}]}',
        '{"messages": [{"role": "robot", "content": "x"}]}',
        '{"messages": [{"role": "user", "content": ["x"]}]}',
        '{"messages": [{"role": "user", "content": null}]}',
        '{"messages": [{"role": "user", "content": [{"type": "sound"}]}]}',
        '{"messages": [{"role": "user", "content": [{"type": "image", "path": "a.png", "caption": 3}]}]}',
    ],
)
def test_jsonl_names_the_bad_line(row: str, tmp_path: Path) -> None:
    with pytest.raises(Mgp5Error, match=r"train\.jsonl:2"):
        jsonl.load(write_jsonl(tmp_path, chat("a.png"), row))


# What training reads


def test_keyed_samples_of_several_sources(tmp_path: Path) -> None:
    parts = [cc3m.load(write_cc3m(tmp_path, "a\ttrain/0.jpg", "b\ttrain/1.jpg", "c\ttrain/9.jpg"))]
    parts.append(jsonl.load(write_jsonl(tmp_path, chat("a.png"), chat("gone.png"))))
    data = Keyed(parts)
    assert len(data) == 3 and [key for key, _ in data] == ["train/0.jpg", "train/1.jpg", "train.jsonl:1/1"]
    assert [sample for _, sample in data] == [*parts[0], *parts[1]] and data[-1] == data[2]
    assert data.problems == {"missing image": 2} and data.problems.first["missing image"].startswith("cc3m_train.tsv:4")
    assert list(pickle.loads(pickle.dumps(data))) == list(data)
    with pytest.raises(IndexError):
        data[3]


def test_settings_reach_the_loaders(tmp_path: Path) -> None:
    write_cc3m(tmp_path, "a\ttrain/0.jpg", "b\ttrain/1.jpg", "c\ttrain/9.jpg")
    write_vist(tmp_path, {"s": story()})
    write_dialogs(tmp_path, [said("hi"), said("yes"), said("and"), said("or"), said("x" * 51), said("end")])
    sources, skipped = [(format, tmp_path) for format in ("cc3m", "vist", "mmdialog")], []

    def keys(**settings: object) -> list[str]:
        return [key for key, _ in load_sources(sources, DataConfig(**settings), count=len, tell=skipped.append)]

    assert len(keys()) == 2 + 13 + 3
    assert len(skipped) == 1 and "1 x missing image" in skipped[0]
    some = keys(instruct_every=2, tasks=("narrate",), narrate_first=True, turn_tokens=50, user_targets=True)
    assert some[:3] == ["train/0.jpg", "train/1.jpg", "train/1.jpg#instruction"]
    assert some[3:] == [*(f"s/{n}/narrate" for n in range(5)), "0/1", "0/2", "0/3"]
    with pytest.raises(Mgp5Error, match=r"no data at .*gone.*; shards are a stream and go with no other") as caught:
        load_sources([("shards", tmp_path), ("vist", tmp_path / "gone")], DataConfig(), count=len)
    assert caught.value.exit_code == 2

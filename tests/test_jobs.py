"""`mgp5 story --batch`: every line once, whatever happens, and each as if it were alone."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner
from tiny import picture

from mgp5 import Image, Message, Options, Text
from mgp5.apps.batch import Batch, BatchRequest
from mgp5.cli import main
from mgp5.views.files import StoryFolder, read_png_metadata

QUICK = ("--steps", "1", "--set", "max_tokens=6", "--backend", "eager")


def chat(text: str, **more: object) -> str:
    return json.dumps({"messages": [{"role": "user", "content": text}]} | more)


@pytest.fixture
def batch(small_folder, tmp_path, monkeypatch):
    """Writes lines to a file and runs them."""
    monkeypatch.chdir(tmp_path)
    picture("red").save("a.png")

    def run(*lines: str, out: str = "out", code: int = 0, flags: tuple[str, ...] = ("--seed", "3")):
        Path("b.jsonl").write_text("".join(f"{line}\n" for line in lines))
        args = ["story", "--batch", "b.jsonl", "--out", out, "--model", str(small_folder), *QUICK, *flags]
        result = CliRunner().invoke(main, args)
        assert result.exit_code == code, result.output
        return result

    return run


def rows(out: str | Path = "out") -> dict[int, dict]:
    """Of results.jsonl, by line; no line is there twice."""
    found = [json.loads(line) for line in Path(out, "results.jsonl").read_text().splitlines()]
    assert len({row["line"] for row in found}) == len(found)
    return {row["line"]: row for row in found}


def told(out: str | Path, line: int) -> tuple:
    """Messages of a line without what depends on rounding, and the bytes of its pictures."""
    conversation, facts = StoryFolder.open(Path(out) / f"{line:06d}").load()
    said = [(m.role, m.text) for m in conversation.messages]
    return said, facts["seed"], [image.load().size for image in conversation.images]


STORY = json.dumps({"story": [{"path": "a.png", "text": "A day."}, {"path": "a.png"}, {"text": "It snows."}]})


def test_conversations_and_stories_as_if_each_were_alone(batch, small_folder):
    lines = chat("one", options={"image": "always"}), STORY, "", chat("two", title="Two")
    batch(*lines)
    assert sorted(rows()) == [1, 2, 4] and rows()[2]["folder"] == "000002"
    conversation, facts = StoryFolder.open(Path("out/000002")).load()
    assert [m.role for m in conversation.messages] == ["user", "user", "assistant", "user", "assistant", "assistant"]
    assert facts["seed"] == 10_003 and facts["options"]["backend"] == "eager"
    assert Path("out/000002/story.html").is_file()
    assert read_png_metadata(conversation.messages[-1].images[0].path)["seed"] == 10_303
    batch(*lines, out="single", flags=("--seed", "3", "--at-once", "1"))
    assert all(told("single", line) == told("out", line) for line in (1, 2, 4))
    given = ["--images", "given", "--text", "lines.txt", "--seed", "10003", "--out", "story"]
    Path("given").mkdir()
    picture("red").save("given/1.png")
    picture("red").save("given/2.png")
    Path("given/1.txt").write_text("A day.")
    Path("lines.txt").write_text("It snows.")
    assert CliRunner().invoke(main, ["story", "--model", str(small_folder), *QUICK, *given]).exit_code == 0
    assert [(m.role, m.text) for m in StoryFolder.open(Path("story")).load()[0].messages] == told("out", 2)[0]


def test_a_killed_batch_goes_on_and_does_every_line_once(tmp_path):
    def answer(asks):
        return [Message("assistant", (Text(f"reply {options.seed}"), Image(pixels=picture()))) for _, options in asks]

    def run(out: str) -> Iterator[dict]:
        request = BatchRequest(file=tmp_path / "b.jsonl", out=tmp_path / out, at_once=2, options=Options(seed=3))
        return Batch(request).run(answer)

    (tmp_path / "b.jsonl").write_text("\n".join([*(chat(f"number {n}") for n in range(5)), STORY]))
    picture("red").save(tmp_path / "a.png")
    first = run("out")
    assert [next(first)["line"] for _ in range(3)] == [1, 2, 3]
    results, left = tmp_path / "out/results.jsonl", tmp_path / "out/000004"
    before = results.read_bytes()
    results.write_bytes(before + b'{"line": 4, "key": "')  # killed in the middle of a row
    left.mkdir()  # and between the folder and its row
    (left / "old.txt").write_text("old")
    assert [row["line"] for row in run("out")] == [4, 5, 6]
    assert results.read_bytes().startswith(before) and not (left / "old.txt").exists()
    assert not list((tmp_path / "out").glob(".*"))
    list(run("whole"))
    assert rows(tmp_path / "out") == rows(tmp_path / "whole") and len(rows(tmp_path / "out")) == 6
    assert all(told(tmp_path / "out", line) == told(tmp_path / "whole", line) for line in range(1, 7))
    assert list(run("out")) == []


WRONG = {
    "nonsense": "not JSON",
    '{"story": [{"text": "a", "text": "b"}]}': "it has 'text' twice in one object",
    "[]": "not a conversation or a story",
    '{"messages": [], "scenes": 1}': "empty conversation",
    '{"messages": [{"role": "user"}, 3]}': "no role",
    '{"messages": [{"role": "user", "content": [3]}]}': "the part 3",
    '{"messages": [{"role": "assistant", "content": "hi"}]}': "not the user's",
    '{"messages": [{"role": "user", "content": [{"type": "image", "path": "../a.png"}]}]}': "leaves its folder",
    '{"story": [{"path": "no.png"}]}': "no image at no.png",
    '{"story": [{}]}': "a scene is {}",
    '{"story": [{"text": " "}]}': 'a scene is {"text": " "}',
    '{"story": [{"text": "a"}], "scenes": -1}': "not a conversation or a story",
    '{"story": [{"text": "a"}], "color": 1}': "not a conversation or a story",
    '{"story": [{"text": "a"}], "options": {"steps": 0}}': "steps is 0",
    '{"story": [{"text": "a"}], "options": {"nope": 0}}': "no setting nope",
    chat("word " * 2000): "context is",
}


def test_lines_that_fail_are_told_at_the_end_and_tried_again(batch):
    result = batch(*WRONG, chat("good"), code=1)
    assert f"{len(WRONG)} of {len(WRONG) + 1} lines failed" in result.stderr
    failures = [json.loads(line) for line in Path("out/failures.jsonl").read_text().splitlines()]
    for row, words in zip(failures, WRONG.values(), strict=True):
        assert words in row["error"] and "\n" not in row["error"]
    assert list(rows()) == [len(WRONG) + 1]
    batch(*[chat("better") for _ in WRONG], chat("good"))
    assert len(rows()) == len(WRONG) + 1 and not Path("out/failures.jsonl").read_text()


def test_an_error_that_nobody_foresaw_costs_its_line_only(batch, monkeypatch):
    from mgp5 import prompts

    real = prompts.prompt

    def fail(backbone, conversation):
        if conversation.messages[-1].text == "odd":
            raise TypeError("nobody foresaw this")
        return real(backbone, conversation)

    monkeypatch.setattr("mgp5.inference.session.prompt", fail)
    batch(chat("one"), chat("odd"), chat("half \ud800"), chat("two"), code=1)
    failures = [json.loads(line) for line in Path("out/failures.jsonl").read_text().splitlines()]
    assert list(rows()) == [1, 4] and [row["line"] for row in failures] == [2, 3]
    assert "TypeError: nobody foresaw" in failures[0]["error"] and "is not UTF-8" in failures[1]["error"]


def test_another_batch_in_the_same_folder_is_refused(batch, small_folder):
    batch(chat("one"), flags=())  # a seed that was not given is kept
    batch(chat("one"), chat("two"), flags=("--json",))
    assert rows()[2]["seed"] == rows()[1]["seed"] + 10_000
    assert "line 1 has changed" in batch(chat("other"), code=2, flags=()).stderr
    assert "with another options" in batch(chat("one"), code=2, flags=("--seed", "0", "--guidance", "2")).stderr
    Path("mine").mkdir()
    Path("mine/file").touch()
    assert "holds no batch" in batch(chat("one"), code=2, out="mine").stderr
    assert "--batch goes with --out" in batch(chat("one"), code=2, flags=("--title", "x")).stderr
    Path("gone.jsonl").unlink(missing_ok=True)
    args = ["story", "--batch", "gone.jsonl", "--out", "new", "--model", str(small_folder)]
    assert "gone.jsonl cannot be read" in CliRunner().invoke(main, args).stderr and not Path("new").exists()

"""Views: what is made is kept, pages are self-contained, and stdout holds nothing but text."""

import io
import json
import re
from collections.abc import Iterator
from pathlib import Path

import PIL.Image
import pytest
from browser import Page

from mgp5.errors import Mgp5Error, counted
from mgp5.events import Finished, ImageDone, ImageStep, SceneStart, TextChunk
from mgp5.messages import Conversation, Image, Message, Text
from mgp5.views.files import STORY, JsonEvents, StoryFolder, keep_images, read_png_metadata, write_png
from mgp5.views.html import Scene, scenes, write_html
from mgp5.views.tables import show, table
from mgp5.views.terminal import TerminalView

MADE = {"model": "demo", "seed": 7, "options": {"steps": 4}}
META = {"prompt": 'Ein „Fuchs“ \U0001f98a says "hi"', "seed": 7, "steps": 4, "guidance": 7.5, "sampler": "ddim"}


def picture(colour: str = "red", meta: dict | None = None) -> Image:
    return Image(pixels=PIL.Image.new("RGB", (8, 6), colour), meta=meta or {})


def tale(*colours: str) -> Conversation:
    told = Conversation().add("system", "Draw.")
    for number, colour in enumerate(colours):
        told = told.add("user", "Tell me the next scene with image.")
        told = told.add("assistant", f"Scene {number}.", picture(colour, META | {"seed": number}))
    return told


def some_events() -> Iterator:
    image = picture("blue", META)
    yield from (SceneStart(0, "continued", 1), TextChunk(" The fox "), TextChunk("smiles."))
    yield from (ImageStep(0, 1, 2), ImageStep(0, 2, 2), ImageDone(0, image), TextChunk("\nThe end."))
    yield Finished(Message("assistant", (Text("The fox smiles."), image)), "stop", {"seed": 7})


def test_png_tells_how_it_was_made(tmp_path: Path) -> None:
    write_png(picture("red", META), tmp_path / "a.png")
    metadata = read_png_metadata(tmp_path / "a.png")
    assert metadata.pop("version") and metadata == META
    with PIL.Image.open(tmp_path / "a.png") as opened:
        assert (opened.text["prompt"], opened.text["seed"]) == (META["prompt"], "7")
    write_png(picture(), tmp_path / "b.png")
    assert read_png_metadata(tmp_path / "b.png") == {}
    (tmp_path / "c.png").write_text("no picture")
    for name in ("c.png", "missing.png"):
        with pytest.raises(Mgp5Error, match=name):
            read_png_metadata(tmp_path / name)


def test_story_survives_being_saved_loaded_and_continued(tmp_path: Path) -> None:
    given = tmp_path / "photo.jpg"
    exif = PIL.Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "private camera"
    PIL.Image.new("RGB", (8, 6), "green").save(given, exif=exif)
    story = tale("red", "blue").add("user", Image(path=given), "And now?")
    folder = StoryFolder.create(tmp_path / "deep" / "story")
    folder.save(story, **MADE, title="A fox")

    again = StoryFolder.open(tmp_path / "deep" / "story" / STORY)
    loaded, facts = again.load()
    assert facts == MADE | {"title": "A fox"}
    assert [message.text for message in loaded.messages] == [message.text for message in story.messages]
    assert [image.path.name for image in loaded.images] == ["001.png", "002.png", "003.jpg"]
    assert loaded.images[1].meta == META | {"seed": 1}
    assert loaded.images[1].load().getpixel((0, 0)) == (0, 0, 255)
    assert loaded.images[2].load().size == (6, 8)  # upright, although its EXIF data is gone
    assert not PIL.Image.open(loaded.images[2].path).getexif()

    before = {path: path.stat().st_mtime_ns for path in again.path.glob("0*")}
    again.save(loaded.add("assistant", "More.", picture("white", META)), **MADE)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert again.load()[0].images[3].path.name == "004.png"


def test_saving_again_writes_only_what_is_new_and_undo_loses_nothing(tmp_path: Path, monkeypatch) -> None:
    folder = StoryFolder.create(tmp_path)
    first = tale("red")
    assert folder.keep(first.images[0]) == tmp_path / "001.png"
    folder.save(first, **MADE)
    folder.save(first.add("assistant", picture("blue")), **MADE)
    folder.save(first.add("assistant", picture("green")), **MADE)  # the blue one was undone
    assert [image.path.name for image in folder.load()[0].images] == ["001.png", "003.png"]
    assert (tmp_path / "002.png").exists()
    folder.save(first.add("assistant", Image(path=tmp_path / "002.png")), **MADE)  # redone
    assert folder.load()[0].images[1].path.name == "002.png"

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    before = (tmp_path / STORY).read_bytes()
    monkeypatch.setattr("mgp5.files.os.replace", full)
    with pytest.raises(Mgp5Error, match="No space left"):
        folder.save(first, **MADE)
    assert (tmp_path / STORY).read_bytes() == before
    folder.close()
    assert not list(tmp_path.glob(".*"))


def test_a_story_is_never_overwritten(tmp_path: Path) -> None:
    StoryFolder.create(tmp_path).save(tale("red"), **MADE)
    with pytest.raises(Mgp5Error, match=r"--out .*already holds a story: .*--resume"):
        StoryFolder.create(tmp_path)
    for taken in (tmp_path / STORY, tmp_path / STORY / "below"):
        with pytest.raises(Mgp5Error, match="--out"):
            StoryFolder.create(taken)
    with pytest.raises(Mgp5Error, match=r"holds no story\.json"):
        StoryFolder.open(tmp_path / "elsewhere")


def _story(**changes: object) -> str:
    return json.dumps({"format": "mgp5-story", "version": 1, "messages": []} | changes)


def _image(path: object, **more: object) -> list:
    return [{"role": "user", "content": [{"type": "image", "path": path} | more]}]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("[]", "holds a JSON list"),
        (_story(format="else"), "no story"),
        (_story(version=2), "version 2"),
        (_story(options=3), "options"),
        (_story(messages={}), "no story"),
        (_story(messages=["hi"]), "no role"),
        (_story(messages=[{"role": "user", "content": 3}]), "the content 3"),
        (_story(messages=[{"role": "user", "content": ["hi"]}]), "the part 'hi'"),
        (_story(messages=[{"role": "user", "content": [{"type": "video"}]}]), "the part .*video"),
        (_story(messages=_image("nothing.png")), "'nothing.png'.*not there"),
        (_story(messages=_image("../secret.png")), "leaves its folder"),
        (_story(messages=_image("/etc/passwd")), "leaves its folder"),
        (_story(messages=_image("link/secret.png")), "leaves its folder"),
        (_story(messages=_image("a\0b")), "leaves its folder"),
        (_story(messages=_image("a.png", meta=[])), "the part .*meta"),
    ],
)
def test_a_broken_story_is_refused_in_words(tmp_path: Path, text: str, reason: str) -> None:
    write_png(picture(), tmp_path / "secret.png")
    folder = tmp_path / "story"
    folder.mkdir()
    (folder / "link").symlink_to(tmp_path)
    (folder / STORY).write_text(text)
    with pytest.raises(Mgp5Error, match=reason):
        StoryFolder.open(folder).load()


def test_events_become_json_lines(tmp_path: Path) -> None:
    stream = io.StringIO()
    with JsonEvents(stream) as view:
        for event in keep_images(some_events(), StoryFolder.create(tmp_path)):
            view(event)
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    kinds = ["scene", "text", "text", "image_step", "image_step", "image", "text", "finished"]
    assert [line["event"] for line in lines] == kinds and lines[1]["text"] == " The fox "
    assert (lines[5]["path"], lines[5]["seed"]) == (str(tmp_path / "001.png"), 7)
    assert read_png_metadata(tmp_path / "001.png")["seed"] == 7
    few = io.StringIO()
    for event in some_events():
        JsonEvents(few, steps=False)(event)
    assert few.getvalue().count("\n") == len(kinds) - 2 and "image_step" not in few.getvalue()


@pytest.mark.parametrize("width", [80, None])
def test_tables_lose_nothing(monkeypatch, width: int | None) -> None:
    name, path = "a-model-with-a-long-name-7b", "/a/very/long/" + 20 * "folder/" + "model"
    out = Screen() if width else io.StringIO()
    monkeypatch.setenv("COLUMNS", str(width))
    show(table("", ["name", "count", "where"], [[name, "", path], [name, "1,200", "x" * 90]]), file=out)
    text = re.sub(r"\x1b\[[\d;]*m", "", out.getvalue())
    assert "…" not in text and text.count(name) == 2
    if width:
        assert max(map(len, text.splitlines())) <= width
        assert path in re.sub(r"\s", "", text.split("1,200")[0])
    else:
        assert path in text and "x" * 90 in text


def test_counts_are_of_one_or_more() -> None:
    assert [counted(n, "update") for n in (0, 1, 2, 1200)] == ["0 updates", "1 update", "2 updates", "1,200 updates"]


@pytest.mark.parametrize("kind", ["story", "chat"])
def test_the_page_is_self_contained_and_escaped(tmp_path: Path, kind: str) -> None:
    evil = '<script>alert("x")</script> & <img src="http://evil.example/">'
    story = tale("red").add("user", evil, picture("blue", {"prompt": evil, '"><b>': evil})).add("assistant", evil)
    write_html(story, MADE | {"title": evil, "lang": '"><script>'}, tmp_path / "story.html", kind=kind)
    text, page = (tmp_path / "story.html").read_text(), Page(tmp_path / "story.html")
    assert not {tag for tag, _ in page.tags} & {"script", "b", "iframe", "object", "form"}
    assert len(page.links()) == 3 and all(link.startswith("data:") for link in page.links())
    assert "url(" not in text and "@import" not in text
    assert "alert" in page.text and sum("alt" in attributes for _, attributes in page.tags) == 2
    assert "Draw." not in page.text  # the system's words


def test_scenes_pair_images_with_their_texts_and_no_word_of_the_users_is_lost() -> None:
    one, two, three = (picture(colour) for colour in ("red", "green", "blue"))
    story = Conversation().add("system", "Look.").add("user", "Given one.", one, "Given two.", two)
    story = story.add("user", "Tell me the next scene: she will draw a picture.").add("assistant", three)
    story = story.add("user", one).add("assistant", "Narrated.").add("user", two).add("assistant")
    story = story.add("assistant", "Continued.", two).add("assistant", "Bye.")
    expected = [("Given one.", one), ("Given two.", two), ("Tell me the next scene: she will draw a picture.", three)]
    expected += [("Narrated.", one), ("", two), ("Continued.", two), ("Bye.", None)]
    assert scenes(story) == [Scene(*page) for page in expected]


def test_a_large_picture_is_made_smaller_for_the_page(tmp_path: Path) -> None:
    noise = PIL.Image.effect_noise((1700, 1000), 90)
    write_html(Conversation().add("user", Image(pixels=noise)), {}, tmp_path / "page.html")
    ((_, shown),) = (tag for tag in Page(tmp_path / "page.html").tags if tag[0] == "img")
    assert shown["src"].startswith("data:image/jpeg") and shown["width"] == "1600"


class Screen(io.StringIO):
    """A terminal, as far as anybody asks."""

    def isatty(self) -> bool:
        return True


def test_only_text_reaches_a_piped_stdout(tmp_path: Path) -> None:
    out, err = io.StringIO(), io.StringIO()
    with TerminalView(stdout=out, stderr=err) as view:
        for event in keep_images(some_events(), StoryFolder.create(tmp_path)):
            view(event)
    assert out.getvalue() == "The fox smiles.\nThe end.\n" and "\x1b" not in err.getvalue()
    assert str(tmp_path / "001.png") in err.getvalue() and "Scene 1 of 1" in err.getvalue()


@pytest.mark.parametrize(
    ("images", "environment", "mark"),
    [
        ("auto", {"TERM": "xterm-kitty"}, "\U0010eeee"), ("auto", {"TERM_PROGRAM": "WezTerm"}, "\x1bP"),
        ("auto", {}, "▀"), ("auto", {"TERM": "xterm-kitty", "TMUX": "/tmp/tmux"}, "▀"),
        ("blocks", {"TERM": "xterm-kitty"}, "▀"), ("blocks", {"NO_COLOR": "1"}, ""), ("auto", {"TERM": "dumb"}, ""),
        ("off", {"TERM": "xterm-kitty"}, ""),
    ],
)  # fmt: skip
def test_pictures_are_drawn_where_the_terminal_can(monkeypatch, images: str, environment: dict, mark: str) -> None:
    for name in ("TMUX", "TERM_PROGRAM", "LC_TERMINAL", "KITTY_WINDOW_ID", "NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in ({"TERM": "xterm-256color", "COLUMNS": "80", "LINES": "24"} | environment).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("sys.stdin", io.StringIO())
    out, err = Screen(), io.StringIO()
    with TerminalView(images, stdout=out, stderr=err) as view:
        for event in some_events():
            view(event)
    assert mark in out.getvalue()
    if not mark:
        assert out.getvalue() == "The fox smiles.\nThe end.\n"
        assert "picture 1 (seed 7)" in err.getvalue()


@pytest.mark.parametrize(("encoding", "shown"), [("latin-1", False), ("ascii", False), ("utf-8", True)])
@pytest.mark.parametrize("images", ["auto", "blocks"])
def test_a_terminal_without_utf_8_gets_text_and_paths(monkeypatch, encoding: str, shown: bool, images: str) -> None:
    for name, value in {"TERM": "xterm-kitty", "COLUMNS": "80", "LINES": "24"}.items():
        monkeypatch.setenv(name, value)
    for name in ("TMUX", "TERM_PROGRAM", "LC_TERMINAL", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    out, err = io.TextIOWrapper(io.BytesIO(), encoding=encoding), io.StringIO()
    out.isatty = lambda: True
    with TerminalView(images, stdout=out, stderr=err) as view:
        view(TextChunk("The fox “smiles”."))
        view(ImageDone(0, picture("blue", META)))
    out.flush()
    text = out.buffer.getvalue().decode(encoding)
    assert text.startswith("The fox “smiles”." if shown else "The fox ?smiles?.")
    assert ("\x1b" in text) == shown and ("picture 1 (seed 7)" in err.getvalue()) != shown


def test_a_model_cannot_steer_the_terminal() -> None:
    out = Screen()
    with TerminalView("off", stdout=out, stderr=io.StringIO()) as view:
        view(TextChunk("red \x1b[31malert\x07\x9b2J\tdone\r"))
    assert out.getvalue() == "red [31malert2J\tdone\n"


def test_progress_is_shown_on_a_terminal_only_and_cleared_when_interrupted() -> None:
    out, err = io.StringIO(), Screen()
    with pytest.raises(KeyboardInterrupt), TerminalView(stdout=out, stderr=err) as view:
        view(TextChunk("The fox"))
        view(ImageStep(0, 1, 20))
        raise KeyboardInterrupt
    assert out.getvalue() == "The fox\n"
    assert "1/20" in err.getvalue()

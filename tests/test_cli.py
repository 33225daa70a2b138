"""The command line on a tiny model: stories, chats, and one clear line for every bad input."""

from __future__ import annotations

import builtins
import json
import shutil
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner
from PIL import Image as pil
from tiny import picture, same_pixels, save_pipeline

from mgp5 import Conversation, cli
from mgp5.apps.chat import Chat
from mgp5.commands.repl import Repl
from mgp5.events import ImageDone
from mgp5.views.files import StoryFolder, read_png_metadata
from mgp5.views.terminal import TerminalView

QUICK = ("--steps", "2", "--set", "max_tokens=6", "--seed", "1")


@pytest.fixture(scope="session")
def demo(llava_folder, diffusion_folder, tmp_path_factory) -> Path:
    """A complete model folder, as `mgp5 train` and pack.py make one."""
    from mgp5.config import preset
    from mgp5.loading import build, save_checkpoint

    folder = tmp_path_factory.mktemp("demo") / "model"
    shutil.copytree(llava_folder, folder / "mllm")
    shutil.copytree(diffusion_folder, folder / "diffusion")
    torch.manual_seed(1)
    model = build(str(folder / "mllm"), str(folder / "diffusion"), num_vokens=4, guidance=3.0)
    model.prepare(preset("pretrain"))
    save_checkpoint(model, folder)
    edit(folder, mllm="mllm", diffusion="diffusion")
    return folder


def edit(folder: Path, **values) -> Path:
    """Change the configuration of a model folder."""
    path = folder / "mgp5/config.json"
    raw = json.loads(path.read_text())
    path.write_text(json.dumps(raw | {k: raw[k] | v if isinstance(v, dict) else v for k, v in values.items()}))
    return folder


@pytest.fixture(scope="session")
def loaded(demo):
    from mgp5.apps.open_model import load

    return load(demo)


@pytest.fixture
def mgp5(loaded, demo, tmp_path, monkeypatch):
    """Runs a command on the tiny model, which is loaded once, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("mgp5.apps.open_model.load", lambda name, **_: loaded)

    def run(command: str, *args: object, stdin: str | None = None):
        given = [command, "--model", str(demo), *QUICK, *map(str, args)]
        return CliRunner().invoke(cli.main, given, input=stdin, catch_exceptions=False)

    return run


@pytest.fixture
def pictures(tmp_path) -> Path:
    """A red picture with a text, and a blue one without."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    picture("red").save(folder / "2.png")
    picture("blue").save(folder / "10.jpg")
    (folder / "2.txt").write_text("A red day.\n")
    return folder


def fails(result, *words: object, code: int = 1) -> None:
    """One line on stderr that holds the words, nothing on stdout, no traceback."""
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("mgp5: "), result.stderr
    assert "MGP5_DEBUG" not in lines[0]
    for word in words:
        assert str(word) in lines[0]
    assert result.exit_code == code, lines
    assert not result.stdout


def story_of(folder: Path) -> dict:
    return json.loads((folder / "story.json").read_text())


def parts(folder: Path) -> list[tuple[str, str]]:
    """(role, kind) of every part of a story."""
    return [(m["role"], part["type"]) for m in story_of(folder)["messages"] for part in m["content"]]


def paths(folder: Path) -> list[str]:
    """The paths of all pictures of a story."""
    return [part["path"] for m in story_of(folder)["messages"] for part in m["content"] if part["type"] == "image"]


# Stories


def test_story_goes_through_what_is_given_and_continues(mgp5, pictures, tmp_path):
    (tmp_path / "lines.txt").write_text("The fox sleeps.\n\n")
    result = mgp5("story", "--images", "pictures", "--text", "lines.txt", "--out", "out", "--title", "Fox")
    assert result.exit_code == 0, result.stderr
    kinds = ["yours", "your picture, narrated", "your text, illustrated", "continued by the model"]
    assert [line.split(" · ")[1] for line in result.stderr.splitlines() if line.startswith("Scene ")] == kinds
    given, narrated, illustrated, continued = (
        [("user", "image"), ("user", "text")],
        [("user", "image"), ("assistant", "text")],
        [("user", "text"), ("assistant", "image")],
        [("assistant", "text"), ("assistant", "image")],
    )
    assert parts(tmp_path / "out") == given + narrated + illustrated + continued
    story = story_of(tmp_path / "out")
    assert (story["title"], story["seed"], story["options"]["steps"]) == ("Fox", 1, 2)
    texts = [part["text"] for m in story["messages"] for part in m["content"] if part["type"] == "text"]
    assert texts[0] == "A red day." and texts[2] == "The fox sleeps."
    assert (tmp_path / "out/story.html").read_text().count("data:image/") == 4


def test_stdout_holds_the_text_and_nothing_else(mgp5, pictures, tmp_path):
    result = mgp5("story", "--images", "pictures", "--scenes", 1, "--out", "out")
    told = [part["text"] for m in story_of(tmp_path / "out")["messages"] for part in m["content"] if "text" in part]
    assert "".join(result.stdout.split()) == "".join("".join(told).split())
    assert result.stdout.count("\x1b") == "".join(told).count("\x1b")  # none but what a random model may say


def test_pictures_carry_how_they_were_made(mgp5, pictures, tmp_path):
    mgp5("story", "--images", "pictures", "--scenes", 1, "--out", "out")
    assert paths(tmp_path / "out") == ["001.png", "002.jpg", "003.png"]
    facts = read_png_metadata(tmp_path / "out/003.png")
    assert facts["seed"] == 201 and facts["steps"] == 2 and facts["guidance"] == 3.0 and facts["sampler"]
    with pil.open(tmp_path / "out/003.png") as made:
        assert made.size == (16, 16)


def test_json_lines_parse_and_name_the_pictures(mgp5, pictures, tmp_path):
    result = mgp5("story", "--images", "pictures", "--scenes", 1, "--out", "out", "--json")
    events = [json.loads(line) for line in result.stdout.splitlines()]
    assert [event["kind"] for event in events if event["event"] == "scene"] == ["given", "narrated", "continued"]
    assert [event["step"] for event in events if event["event"] == "image_step"] == [1, 2]
    assert all(Path(event["path"]).is_file() for event in events if event["event"] == "image")
    assert events[-1]["event"] == "finished" and events[-1]["images"] == 1
    assert not result.stderr


def test_same_seed_same_text_and_pixels(mgp5, pictures, tmp_path):
    def run(out: str, *args: object) -> tuple[str, Path]:
        assert mgp5("story", "--images", "pictures", "--scenes", 1, "--out", out, *args).exit_code == 0
        return json.dumps(story_of(tmp_path / out)["messages"]), tmp_path / out / "003.png"

    (words, made), (same_words, same), (other_words, other) = run("a"), run("b"), run("c", "--seed", 2)
    assert words == same_words != other_words
    assert same_pixels(made, same) and not same_pixels(made, other)


def test_a_seed_that_was_not_given_is_told_and_kept(mgp5, pictures, tmp_path, demo):
    args = ["story", "--model", str(demo), "--steps", "1", "--set", "max_tokens=2", "--images", "pictures"]
    result = CliRunner().invoke(cli.main, [*args, "--scenes", "0"], catch_exceptions=False)
    assert f"seed {story_of(tmp_path / 'story-1')['seed']}" in result.stderr.splitlines()


def test_interruption_keeps_what_was_made(mgp5, pictures, tmp_path, monkeypatch):
    from mgp5.inference import request as generation

    real, calls = generation.to_picture, []

    def interrupted(pixels):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(pixels)

    monkeypatch.setattr(generation, "to_picture", interrupted)
    result = mgp5("story", "--images", "pictures", "--scenes", 3, "--out", "out")
    assert result.exit_code == 130
    assert result.stderr.splitlines()[-1] == "mgp5: interrupted"
    made = parts(tmp_path / "out")
    assert made[:2] == [("user", "image"), ("user", "text")]
    assert made[2:4] == [("user", "image"), ("assistant", "text")]
    assert made[4:6] == [("assistant", "text"), ("assistant", "image")]
    assert made[6:] in ([], [("assistant", "text")])  # of the scene that was cut short
    assert (tmp_path / "out/story.html").is_file()


# Pictures of all kinds


def odd_pictures(folder: Path) -> None:
    folder.mkdir()
    picture(size=(1, 1)).save(folder / "1 pixel.png")
    turned = pil.new("RGB", (40, 20), "red")
    turned.paste("blue", (0, 0, 20, 20))
    exif = pil.Exif()
    exif[0x0112] = 6  # the camera was held upright
    turned.save(folder / "2 turned.jpg", exif=exif)
    pil.new("CMYK", (20, 20), (0, 255, 255, 0)).save(folder / "3 cmyk.jpg")
    pil.new("I;16", (20, 20), 0x8000).save(folder / "4 grey16.png")
    clear = pil.new("P", (20, 20), 0)
    clear.putpalette([0, 0, 0, 255, 0, 0])
    clear.save(folder / "5 clear.png", transparency=0)
    pil.new("LA", (20, 20), (0, 0)).save(folder / "6 clear grey.png")
    pil.new("1", (20, 20), 1).save(folder / "7 bit.png")
    picture("red").save(folder / "8 moving.gif", save_all=True, append_images=[picture("blue")])
    (folder / "._hidden.jpg").write_text("not a picture")


def test_pictures_of_every_kind(mgp5, tmp_path):
    odd_pictures(tmp_path / "odd")
    result = mgp5("story", "--images", "odd", "--scenes", 1, "--out", "out", "--set", "max_tokens=2")
    assert result.exit_code == 0, result.stderr
    shown = [pil.open(tmp_path / "out" / path).convert("RGB") for path in paths(tmp_path / "out")]
    assert shown[0].size == (1, 1)
    assert shown[1].size == (20, 40) and shown[1].getpixel((10, 5))[2] > 200 and shown[1].getpixel((10, 35))[0] > 200
    assert all(abs(a - b) < 40 for a, b in zip(shown[2].getpixel((5, 5)), (255, 0, 0), strict=True))
    assert shown[3].getpixel((5, 5))[0] in (127, 128)
    for clear in shown[4:7]:
        assert clear.getpixel((5, 5)) == (255, 255, 255)
    assert shown[7].getpixel((5, 5))[0] > 200


def header_only_png(side: int) -> bytes:
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(bytes(100)))


@pytest.mark.parametrize("command", ["story", "chat"])
@pytest.mark.filterwarnings("error::PIL.Image.DecompressionBombWarning")
def test_broken_pictures(mgp5, tmp_path, command):
    picture(size=(400, 300)).save(tmp_path / "whole.jpg")
    broken = {
        "text.jpg": (b"this is no picture", "is not an image"),
        "empty.png": (b"", "is not an image"),
        "truncated.jpg": ((tmp_path / "whole.jpg").read_bytes()[:700], "cannot be read"),
        "bomb.png": (header_only_png(50_000), "larger than"),
        "small_bomb.png": (header_only_png(11_000), "more than"),
    }
    for name, (contents, words) in broken.items():
        folder = tmp_path / name.partition(".")[0]
        folder.mkdir()
        (folder / name).write_bytes(contents)
        flags = ("--images", folder) if command == "story" else ("--image", folder / name, "--message", "hi")
        fails(mgp5(command, *flags, "--out", "out"), folder / name, words)
    assert not (tmp_path / "out").exists()


# Bad input


def test_folders_without_pictures(mgp5, tmp_path):
    (tmp_path / "empty").mkdir()
    fails(mgp5("story", "--images", "nowhere"), "--images nowhere", code=2)
    fails(mgp5("story", "--images", "empty"), "--images empty", ".jpg", code=2)
    fails(mgp5("story", "--text", "nothing.txt"), "nothing.txt", code=2)
    fails(mgp5("story"), "--images", "--text", code=2)
    (tmp_path / "blank.txt").write_text(" \n")
    fails(mgp5("story", "--text", "blank.txt"), "--text blank.txt", code=2)
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    fails(mgp5("story", "--text", "latin.txt"), "latin.txt", "UTF-8")
    assert {path.name for path in tmp_path.iterdir()} == {"empty", "blank.txt", "latin.txt"}


def test_models_that_do_not_exist(mgp5, pictures, tmp_path):
    (tmp_path / "empty").mkdir()
    for command in (("story", "--images", "pictures"), ("chat", "--message", "hi")):
        fails(mgp5(*command, "--model", "nope", "--out", "out"), "'nope'", "here without a network", code=2)
        fails(mgp5(*command, "--model", "empty", "--out", "out"), "empty is not a model", code=2)
    assert not (tmp_path / "out").exists()


@pytest.fixture
def changed(demo, diffusion_folder, tmp_path):
    """Makes a copy of the demo model with another configuration; the parts are not copied."""

    def make(**values) -> Path:
        shutil.copytree(demo / "mgp5", tmp_path / "changed/mgp5")
        parts = {"mllm": str(demo / "mllm"), "diffusion": str(demo / "diffusion")}
        return edit(tmp_path / "changed", **parts | values)

    return make


@pytest.fixture
def real_load(monkeypatch):
    """The true `load`, and a hub that cannot be reached."""
    import huggingface_hub.constants

    from mgp5.apps.open_model import load

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return load


@pytest.mark.parametrize("case", ["vokens", "diffusion", "llm", "field", "json", "no weights", "weights", "no llm"])
def test_models_that_do_not_fit(real_load, mgp5, monkeypatch, changed, pictures, tmp_path, case):
    monkeypatch.setattr("mgp5.apps.open_model.load", real_load)
    values, words = {
        "vokens": ({"head_config": {"num_vokens": 3}}, ("3 tokens of its head",)),
        "diffusion": ({"diffusion": str(tmp_path / "epsilon")}, ("v_prediction", "epsilon")),
        "llm": ({"mllm_kind": "llava 32x4096 with 32064 tokens"}, ("trained for llava 32x4096", "is llava 2x32")),
        "field": ({"colour": "red"}, ("config.json", "colour")),
        "json": ({}, ("config.json",)),
        "no weights": ({}, ("model.safetensors",)),
        "weights": ({}, ("model.safetensors",)),
        "no llm": ({"mllm": "somebody/nothing"}, ("cannot load somebody/nothing",)),
    }[case]
    if case == "diffusion":
        save_pipeline(tmp_path / "epsilon", "epsilon")
    folder = changed(**values) / "mgp5"
    if case == "json":
        (folder / "config.json").write_text("{")
    elif case == "no weights":
        (folder / "model.safetensors").unlink()
    elif case == "weights":
        (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:1000])
    result = mgp5("story", "--images", "pictures", "--model", tmp_path / "changed", "--out", "out")
    fails(result, *words)
    assert not (tmp_path / "out/story.json").exists()


def test_a_prompt_longer_than_the_context(mgp5, tmp_path):
    (tmp_path / "long.txt").write_text("word " * 1000)
    fails(mgp5("chat", "--message", "word " * 1000, "--out", "talk", "--backend", "eager"), "tokens", "context is 1024")
    assert not list((tmp_path / "talk").iterdir())
    result = mgp5("story", "--text", "long.txt", "--out", "out")
    assert result.exit_code == 1 and "context is 1024" in result.stderr.splitlines()[-1]
    assert not (tmp_path / "out/story.json").exists()  # the same --out may be used again


@pytest.mark.parametrize(
    "setting, word",
    [
        ("steps", "name=value"),
        ("nope=1", "nope"),
        ("steps=many", "steps is 'many', expected int"),
        ("steps=0", "steps is 0"),
        ("top_p=2", "top_p is 2"),
        ("image=maybe", "image is maybe"),
        ("steps.a=1", "steps"),
        ("=1", "name=value"),
    ],
)
def test_bad_settings(mgp5, pictures, tmp_path, setting, word):
    fails(mgp5("story", "--images", "pictures", "--set", setting, "--out", "out"), word, code=2)
    assert not (tmp_path / "out").exists()


def test_bad_flags_get_one_line_too(mgp5, pictures):
    fails(mgp5("story", "--scenes", -1), "--scenes", "mgp5 story --help", code=2)
    fails(mgp5("story", "--steps", "two"), "--steps", code=2)
    fails(mgp5("story", "--seed", 2**80), "--seed", code=2)
    fails(mgp5("story", "--nope"), "--nope", code=2)
    fails(mgp5("story", "--images", "pictures", "--device", "abacus"), "abacus", code=2)
    fails(mgp5("chat", "--out", "a", "--resume", "b"), "--out", "--resume", code=2)
    fails(mgp5("chat", "--resume", "nowhere"), "nowhere", "story.json")
    fails(mgp5("walk"), "walk", code=2)


@pytest.mark.parametrize(
    "flags, word, code",
    [
        ({"--stage": "third"}, "--stage", 2),
        ({"--format": "csv"}, "'csv'", 2),
        ({"--preset": "best"}, "'best'", 2),
        ({"--set": "lr"}, "name=value", 2),
        ({"--set": "lr=-1"}, "lr is -1", 2),
        ({"--set": "log_every=0"}, "log_every is 0", 2),
        ({"--set": "lora=1"}, "lora", 2),
        ({"--set": "precision=fp8"}, "precision is fp8", 2),
        ({"--config": "nowhere.toml"}, "nowhere.toml", 2),
        ({"--config": "bad.toml"}, "bad.toml", 2),
        ({"--data": "nowhere"}, "no data at nowhere", 2),
        ({"--model": "nope"}, "'nope'", 2),
        ({"--vokens": "99"}, "--vokens", 2),
    ],
)
def test_bad_training_flags(tmp_path, demo, monkeypatch, flags, word, code):
    monkeypatch.chdir(tmp_path)
    Path("bad.toml").write_bytes(b"lr = \xff")
    picture().save("a.jpg")
    Path("train.jsonl").write_text(
        json.dumps({"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]})
    )
    usual = {"--stage": "pretrain", "--data": ".", "--format": "jsonl", "--model": str(demo), "--out": "out"}
    args = [text for pair in (usual | flags).items() for text in pair]
    fails(CliRunner().invoke(cli.main, ["train", *args], catch_exceptions=False), word, code=code)
    assert not Path("out").exists()


def test_an_error_nobody_foresaw_is_one_line_too(mgp5, monkeypatch, pictures):
    def fail(*args: object, **more: object) -> None:
        raise ZeroDivisionError("two\nlines")

    monkeypatch.setattr("mgp5.apps.story.read_folder", fail)
    result = mgp5("story", "--images", "pictures")
    assert result.stderr == "mgp5: ZeroDivisionError: two lines (MGP5_DEBUG=1 shows where)\n"
    assert result.exit_code == 1
    monkeypatch.setenv("MGP5_DEBUG", "1")
    with pytest.raises(ZeroDivisionError):
        mgp5("story", "--images", "pictures")


def test_help_is_quick_because_it_imports_nothing_heavy():
    code = (
        "import sys; from click.testing import CliRunner; from mgp5.cli import main\n"
        "import mgp5.views.files, mgp5.views.html, mgp5.views.inline, mgp5.views.terminal\n"
        "for args in ([], ['story'], ['chat'], ['train'], ['data', 'storyland']):\n"
        "    assert CliRunner().invoke(main, [*args, '--help']).exit_code == 0\n"
        "print(*({'torch', 'rich', 'transformers', 'diffusers', 'PIL', 'numpy', 'textual_image'} & sys.modules.keys()))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "\n"


# Chats


def test_chat_answers_messages_and_goes_on_from_a_folder(mgp5, pictures, tmp_path):
    first = mgp5("chat", "--image", "pictures/2.png", "--message", "look", "--message", "and?", "--out", "talk")
    assert first.exit_code == 0 and first.stdout.strip()
    roles = [message["role"] for message in story_of(tmp_path / "talk")["messages"]]
    assert roles == ["system", "user", "assistant", "user", "assistant"]
    assert parts(tmp_path / "talk")[1:3] == [("user", "image"), ("user", "text")]
    second = mgp5("chat", "--resume", "talk", stdin="go on\n\n")
    assert second.exit_code == 0
    assert [message["role"] for message in story_of(tmp_path / "talk")["messages"]] == [*roles, "user", "assistant"]
    assert (tmp_path / "talk/story.html").is_file()


def test_a_resumed_chat_gives_the_replies_of_one_in_a_single_run(mgp5, tmp_path):
    mgp5("chat", "--message", "one", "--message", "two", "--out", "whole")
    mgp5("chat", "--message", "one", "--out", "pieces")
    mgp5("chat", "--message", "two", "--resume", "pieces")
    assert story_of(tmp_path / "whole")["messages"] == story_of(tmp_path / "pieces")["messages"]


def test_chat_pictures_are_kept_although_no_folder_was_asked_for(mgp5, tmp_path):
    result = mgp5("chat", "--message", "draw", "--set", "image=always")
    assert "chat-1" in result.stderr
    assert ("assistant", "image") in parts(tmp_path / "chat-1")


@pytest.fixture
def talk(loaded, tmp_path, monkeypatch):
    """Types lines into a chat; returns the chat, its Repl and what it said on stderr."""
    from mgp5.options import reply_options

    monkeypatch.chdir(tmp_path)
    chat = Chat(loaded, reply_options(seed=1, steps=1, max_tokens=6, image="never"))
    chat.record = {"model": "tiny", "options": {}}
    repl = Repl(chat, lambda: TerminalView("off"))

    def type_lines(*lines: str | type[BaseException]) -> None:
        queue = iter([*lines, EOFError])

        def typed(prompt: str) -> str:
            line = next(queue)
            if isinstance(line, str):
                return line
            raise line

        monkeypatch.setattr(builtins, "input", typed)
        repl.run()

    return SimpleNamespace(chat=chat, repl=repl, type=type_lines)


def texts(conversation: Conversation) -> list[str]:
    return [message.text for message in conversation.messages[1:]]


def test_undo_takes_back_a_message_and_its_reply(talk, capfd):
    talk.type("hello", "how are you?", "/undo")
    said = texts(talk.chat.conversation)
    assert said[0] == "hello" and len(said) == 2
    assert "took back: how are you?" in capfd.readouterr().err
    talk.type("/undo", "/undo")
    assert not texts(talk.chat.conversation)
    assert "no message of yours" in capfd.readouterr().err


def test_retry_gives_another_reply_and_seed_chooses_it(talk):
    talk.type("hello")
    first = texts(talk.chat.conversation)
    talk.type("/retry")
    second = texts(talk.chat.conversation)
    assert second[0] == first[0] and second[1] != first[1] and len(second) == 2
    talk.type("/seed 1", "/retry")
    assert texts(talk.chat.conversation) == first


def test_image_goes_with_the_next_message_and_save_writes_it(talk, tmp_path, capfd):
    picture().save(tmp_path / "cat.png")
    talk.type("/image cat.png", "look", "/save kept", "bye", "/quit", "never said")
    assert parts(tmp_path / "kept")[1:3] == [("user", "image"), ("user", "text")]
    assert texts(StoryFolder.open(tmp_path / "kept").load()[0])[2] == "bye"
    assert "never said" not in texts(talk.chat.conversation)
    assert "cat.png goes with your next message" in capfd.readouterr().err


def test_mistakes_are_told_and_the_chat_goes_on(talk, tmp_path, capfd):
    (tmp_path / "no.jpg").write_text("text")
    (tmp_path / "file").write_text("mine")
    wrong = [
        "/dance",
        "/image no.jpg",
        "/image",
        "/seed x",
        "/seed --5",
        "/seed ²",
        "/save file",
        "/retry",
        "a " * 1000,
    ]
    talk.type("/help", *wrong, KeyboardInterrupt, "hello")
    said = capfd.readouterr().err
    assert all(command in said for command in ("/undo", "/retry", "/seed N", "/save DIR", "/quit"))
    assert said.count("mgp5: ") == len(wrong)
    assert texts(talk.chat.conversation)[0] == "hello"


def test_a_stopped_reply_is_kept_and_its_picture_is_not_sent_twice(talk, tmp_path, monkeypatch, capfd):
    from mgp5.inference.decoder import Decoder

    real, calls = Decoder.steps, []

    def stop(*args: object) -> dict:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(Decoder, "steps", stop)
    picture().save(tmp_path / "cat.png")
    talk.type("/image cat.png", "look", "go on")
    messages = talk.chat.conversation.messages[1:]
    assert "what was said is kept" in capfd.readouterr().err
    assert [len(message.images) for message in messages if message.role == "user"] == [1, 0]
    assert not talk.chat.pending


def test_a_story_is_told_without_the_command_line(loaded, pictures):
    from mgp5.apps.story import StoryRequest, tell_story
    from mgp5.options import reply_options

    request = StoryRequest(images=pictures, options=reply_options(steps=1, max_tokens=2))
    events = list(tell_story(request, loaded))
    assert sum(isinstance(event, ImageDone) for event in events) == 3

"""The command line on a tiny model: stories, and one clear line for every bad input."""

import json
import shutil
import struct
import zlib
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from PIL import Image as pil
from tiny import parts_of, picture, same_pixels, story_of

from mgp5 import cli
from mgp5.apps.inputs import read_images
from mgp5.apps.story import StoryRequest, tell_story
from mgp5.events import ImageDone
from mgp5.options import reply_options
from mgp5.views.files import read_png_metadata


def check_fails(result, *words: object, code: int = 1) -> None:
    """One line on stderr that holds the words, nothing on stdout, no traceback."""
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("mgp5: "), result.stderr
    assert "MGP5_DEBUG" not in lines[0]
    for word in words:
        assert str(word) in lines[0]
    assert result.exit_code == code, lines
    assert not result.stdout


def texts_of(folder: Path) -> list[str]:
    return [part["text"] for m in story_of(folder)["messages"] for part in m["content"] if part["type"] == "text"]


# Stories


def test_story_goes_through_what_is_given_and_continues(mgp5, pictures, tmp_path):
    (tmp_path / "lines.txt").write_text("The fox sleeps.\n\n")
    result = mgp5("story", "--images", "pictures", "--text", "lines.txt", "--out", "out", "--title", "Fox")
    assert result.exit_code == 0, result.stderr
    kinds = ["yours", "your picture, narrated", "your text, illustrated", "continued by the model"]
    assert [line.split(" · ")[1] for line in result.stderr.splitlines() if line.startswith("Scene ")] == kinds
    given, narrated, illustrated, continued = (
        [("user", "image"), ("user", "text")], [("user", "image"), ("assistant", "text")],
        [("user", "text"), ("assistant", "image")], [("assistant", "text"), ("assistant", "image")],
    )  # fmt: skip
    assert parts_of(tmp_path / "out") == given + narrated + illustrated + continued
    story, texts = story_of(tmp_path / "out"), texts_of(tmp_path / "out")
    assert (story["title"], story["seed"], story["options"]["steps"]) == ("Fox", 1, 2)
    assert texts[0] == "A red day." and texts[2] == "The fox sleeps."
    assert (tmp_path / "out/story.html").read_text().count("data:image/") == 4


def test_stdout_holds_the_text_and_pictures_carry_how_they_were_made(mgp5, pictures, tmp_path):
    result = mgp5("story", "--images", "pictures", "--scenes", 1, "--out", "out")
    told = "".join(texts_of(tmp_path / "out"))
    assert "".join(result.stdout.split()) == "".join(told.split())
    assert result.stdout.count("\x1b") == told.count("\x1b")  # none but what a random model may say
    content = [part for message in story_of(tmp_path / "out")["messages"] for part in message["content"]]
    assert [part["path"] for part in content if part["type"] == "image"] == ["001.png", "002.jpg", "003.png"]
    facts = read_png_metadata(tmp_path / "out/003.png")
    assert facts["seed"] == 201 and facts["steps"] == 2 and facts["guidance"] == 7.5 and facts["sampler"]
    with pil.open(tmp_path / "out/003.png") as made:
        assert made.size == (16, 16)


def test_a_picture_names_the_words_it_was_drawn_for_and_a_mark_is_none(mgp5, tmp_path):
    """The second has the first in its history, and the prompt a template; a byte-order mark is no text."""
    (tmp_path / "plain.txt").write_text("A fox.\nIt runs.\u2028 Far.")
    (tmp_path / "marked.txt").write_text("\ufeffA fox.\r\nIt runs.\u2028 Far.")
    for name in ("plain", "marked"):
        assert mgp5("story", "--text", f"{name}.txt", "--scenes", 0, "--out", name).exit_code == 0
        prompts = [read_png_metadata(tmp_path / name / f"00{n}.png")["prompt"] for n in (1, 2)]
        assert prompts == ["A fox.", "It runs.\u2028 Far."]
    assert all(same_pixels(tmp_path / f"plain/00{n}.png", tmp_path / f"marked/00{n}.png") for n in (1, 2))
    assert mgp5("chat", "--out", "talk", stdin="\ufeffhi\n").exit_code == 0
    assert texts_of(tmp_path / "talk")[1] == "hi" and "Img" not in (tmp_path / "talk/story.html").read_text()


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


def test_a_seed_that_was_not_given_is_told_and_kept(mgp5, pictures, tmp_path, small_folder):
    args = ["story", "--model", str(small_folder), "--steps", "1", "--set", "max_tokens=2", "--images", "pictures"]
    result = CliRunner().invoke(cli.main, [*args, "--scenes", "0"], catch_exceptions=False)
    assert f"seed {story_of(tmp_path / 'story-1')['seed']}" in result.stderr.splitlines()


def test_a_story_is_told_without_the_command_line(small_model, pictures):
    request = StoryRequest(images=pictures, options=reply_options(steps=1, max_tokens=2))
    assert sum(isinstance(event, ImageDone) for event in tell_story(request, small_model)) == 3


def test_interruption_keeps_what_was_made(mgp5, pictures, tmp_path, monkeypatch):
    from mgp5.inference import request as generation

    real, calls = generation.to_image, []

    def interrupted(*image):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*image)

    monkeypatch.setattr(generation, "to_image", interrupted)
    result = mgp5("story", "--images", "pictures", "--scenes", 3, "--out", "out")
    assert result.exit_code == 130
    assert result.stderr.splitlines()[-1] == "mgp5: interrupted"
    made = parts_of(tmp_path / "out")
    assert made[:4] == [("user", "image"), ("user", "text"), ("user", "image"), ("assistant", "text")]
    assert made[4:6] == [("assistant", "text"), ("assistant", "image")]
    assert made[6:] in ([], [("assistant", "text")])  # of the scene that was cut short
    assert (tmp_path / "out/story.html").is_file()


# Pictures of all kinds


def test_pictures_of_every_kind(tmp_path):
    picture(size=(1, 1)).save(tmp_path / "1 pixel.png")
    turned = pil.new("RGB", (40, 20), "red")
    turned.paste("blue", (0, 0, 20, 20))
    exif = pil.Exif()
    exif[0x0112] = 6  # the camera was held upright
    turned.save(tmp_path / "2 turned.jpg", exif=exif)
    pil.new("CMYK", (20, 20), (0, 255, 255, 0)).save(tmp_path / "3 cmyk.jpg")
    pil.new("I;16", (20, 20), 0x8000).save(tmp_path / "4 grey16.png")
    clear = pil.new("P", (20, 20), 0)
    clear.putpalette([0, 0, 0, 255, 0, 0])
    clear.save(tmp_path / "5 clear.png", transparency=0)
    pil.new("LA", (20, 20), (0, 0)).save(tmp_path / "6 clear grey.png")
    pil.new("1", (20, 20), 1).save(tmp_path / "7 bit.png")
    picture("red").save(tmp_path / "8 moving.gif", save_all=True, append_images=[picture("blue")])
    (tmp_path / "._hidden.jpg").write_text("not a picture")
    shown = [scene.image.load() for scene in read_images([tmp_path])]
    assert len(shown) == 8 and shown[0].size == (1, 1)
    assert shown[1].size == (20, 40) and shown[1].getpixel((10, 5))[2] > 200 and shown[1].getpixel((10, 35))[0] > 200
    assert all(abs(a - b) < 40 for a, b in zip(shown[2].getpixel((5, 5)), (255, 0, 0), strict=True))
    assert shown[3].getpixel((5, 5))[0] in (127, 128)
    assert all(clear.getpixel((5, 5)) == (255, 255, 255) for clear in shown[4:7])
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
        check_fails(mgp5(command, *flags, "--out", "out"), folder / name, words)
    assert not (tmp_path / "out").exists()


# Bad input


@pytest.mark.parametrize(
    "command, words, code",
    [
        ("story --images nowhere", "--images nowhere", 2),
        ("story --images empty", "--images empty|.jpg", 2),
        ("story --text nothing.txt", "nothing.txt", 2),
        ("story", "--images|--text", 2),
        ("story --text blank.txt", "--text blank.txt", 2),
        ("story --text latin.txt", "latin.txt|UTF-8", 1),
        ("story --scenes -1", "--scenes|mgp5 story --help", 2),
        ("story --steps two", "--steps", 2),
        ("story --seed 1208925819614629174706176", "--seed", 2),
        ("story --nope", "--nope", 2),
        ("story --images pictures --device abacus", "abacus", 2),
        ("story --images pictures --model nope", "'nope'|here are demo", 2),
        ("story --images pictures --model empty", "empty is not a model", 2),
        ("story --images pictures --set steps", "name=value", 2),
        ("story --images pictures --set nope=1", "nope", 2),
        ("story --images pictures --set steps=many", "steps is 'many', expected a whole number", 2),
        ("story --images pictures --set steps=0 --set top_p=2", "steps is 0|top_p is 2", 2),
        ("story --images pictures --set top_p=2 --set max_tokens=-1", "top_p is 2|max_tokens is -1", 2),
        ("story --images pictures --set image=maybe", "image is maybe", 2),
        ("story --images pictures --set steps.a=1", "steps", 2),
        ("story --images pictures --set =1", "name=value", 2),
        ("chat --message hi --model nope", "'nope'|here are demo", 2),
        ("chat --message hi --model empty", "empty is not a model", 2),
        ("chat --out a --resume b", "--out|--resume", 2),
        ("chat --resume nowhere", "nowhere|story.json", 1),
        ("chat --out file --message hi", "file has a file in its way", 1),
        ("walk", "walk", 2),
        ("storyy", "'story'? (see mgp5 --help)", 2),
    ],
)
def test_what_is_wrong_is_told_in_one_line(mgp5, pictures, tmp_path, command, words, code):
    (tmp_path / "empty").mkdir()
    (tmp_path / "blank.txt").write_text(" \n")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "file").touch()
    check_fails(mgp5(*command.split()), *words.split("|"), code=code)
    assert {path.name for path in tmp_path.iterdir()} == {"empty", "file", "blank.txt", "latin.txt", "pictures"}


@pytest.mark.parametrize("case", ["vokens", "diffusion", "llm", "field", "json", "no weights", "weights", "no llm"])
def test_models_that_do_not_fit(mgp5, monkeypatch, small_folder, diffusion_folder, pictures, tmp_path, case):
    monkeypatch.undo()  # the real `load`
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    values, words = {
        "vokens": ({"num_vokens": 3}, ("3 tokens of its head",)),
        "diffusion": ({"diffusion": str(diffusion_folder)}, ("v_prediction", "epsilon")),
        "llm": ({"mllm_kind": "llava 32x4096 with 32064 tokens"}, ("trained for llava 32x4096", "is llava 2x32")),
        "field": ({"colour": "red"}, ("config.json", "colour")),
        "json": ({}, ("config.json",)),
        "no weights": ({}, ("model.safetensors",)),
        "weights": ({}, ("model.safetensors",)),
        "no llm": ({"mllm": "somebody/nothing"}, ("cannot load somebody/nothing",)),
    }[case]
    folder = Path(shutil.copytree(small_folder / "mgp5", tmp_path / "changed/mgp5"))
    config = json.loads((folder / "config.json").read_text())
    config["head_config"]["num_vokens"] = values.pop("num_vokens", 4)
    config |= {part: str(small_folder / part) for part in ("mllm", "diffusion")} | values
    (folder / "config.json").write_text("{" if case == "json" else json.dumps(config))
    weights = folder / "model.safetensors"
    if case == "no weights":
        weights.unlink()
    elif case == "weights":
        weights.write_bytes(weights.read_bytes()[:1000])
    result = mgp5("story", "--images", "pictures", "--model", tmp_path / "changed", "--out", "out")
    check_fails(result, *words)
    assert not (tmp_path / "out/story.json").exists()


@pytest.mark.parametrize("command", ["story --text lines.txt", "chat --message hi --set image=always"])
def test_a_picture_of_no_numbers_is_no_picture(mgp5, monkeypatch, tmp_path, command):
    (tmp_path / "lines.txt").write_text("A fox.")
    blank = torch.full((1, 3, 16, 16), float("nan"))
    monkeypatch.setattr("mgp5.generators.latent_diffusion.LatentDiffusion.decode", lambda self, latents: blank)
    result = mgp5(*command.split(), "--out", "out")
    assert result.exit_code == 1 and not list(tmp_path.glob("out/*.png"))
    last = result.stderr.splitlines()[-1]
    assert last.startswith("mgp5: a picture came out as numbers that are not finite") and "--device cpu" in last


def test_a_prompt_longer_than_the_context(mgp5, tmp_path):
    (tmp_path / "long.txt").write_text("word " * 1000)
    result = mgp5("chat", "--message", "word " * 1000, "--out", "talk", "--backend", "eager")
    check_fails(result, "tokens", "context is 1024")
    assert not (tmp_path / "talk").exists()
    result = mgp5("story", "--text", "long.txt", "--out", "out")
    assert result.exit_code == 1 and "context is 1024" in result.stderr.splitlines()[-1]
    assert not (tmp_path / "out/story.json").exists()  # the same --out may be used again


@pytest.mark.parametrize(
    "flag, value, word",
    [
        ("--stage", "third", "stage 'third'"), ("--format", "csv", "'csv'"), ("--preset", "best", "'best'"),
        ("--set", "lr", "name=value"), ("--set", "lr=-1", "lr is -1"), ("--set", "log_every=0", "log_every is 0"),
        ("--set", "lora=1", "lora"), ("--set", "precision=fp8", "precision is fp8"),
        ("--config", "nowhere.toml", "nowhere.toml"), ("--config", "bad.toml", "bad.toml"),
        ("--data", "nowhere", "no data at nowhere"), ("--model", "nope", "'nope'"), ("--vokens", "99", "--vokens"),
    ],
)  # fmt: skip
def test_bad_training_flags(tmp_path, small_folder, monkeypatch, flag, value, word):
    monkeypatch.chdir(tmp_path)
    Path("bad.toml").write_bytes(b"lr = \xff")
    picture().save("a.jpg")
    talk = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    Path("train.jsonl").write_text(json.dumps({"messages": talk}))
    usual = {"--stage": "pretrain", "--data": ".", "--format": "jsonl", "--model": str(small_folder), "--out": "out"}
    args = [text for pair in (usual | {flag: value}).items() for text in pair]
    check_fails(CliRunner().invoke(cli.main, ["train", *args], catch_exceptions=False), word, code=2)
    assert not Path("out").exists()


def test_an_error_nobody_foresaw_is_one_line_too(mgp5, monkeypatch, pictures):
    def fail(*args: object, **more: object) -> None:
        raise ZeroDivisionError("two\nlines")

    monkeypatch.setattr("mgp5.apps.story.read_images", fail)
    result = mgp5("story", "--images", "pictures")
    assert result.stderr == "mgp5: ZeroDivisionError: two lines (MGP5_DEBUG=1 shows where)\n"
    assert result.exit_code == 1
    monkeypatch.setenv("MGP5_DEBUG", "1")
    with pytest.raises(ZeroDivisionError):
        mgp5("story", "--images", "pictures")

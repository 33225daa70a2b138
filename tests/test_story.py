"""Stories that are taken up again, folders that one program writes at a time, and pictures as people have them."""

import contextlib
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny import parts_of, picture, same_pixels, story_of

from mgp5 import Mgp5Error
from mgp5.apps.inputs import read_images, read_lines
from mgp5.cli import main
from mgp5.files import Claim


@pytest.fixture
def tale(mgp5, pictures, tmp_path, monkeypatch):
    """Tells a story of six scenes in a folder; with `stop` it is interrupted at that image, or after its text."""
    from mgp5.inference import request

    (tmp_path / "lines.txt").write_text("The fox sleeps.\n")
    real, flags = request.to_image, ("--images", "pictures", "--text", "lines.txt", "--scenes", 3)

    def tell(out: str, *more: object, stop: int = 0, code: int = 0):
        drawn = []

        def draw(*image):
            drawn.append(1)
            if len(drawn) == stop:
                raise KeyboardInterrupt
            return real(*image)

        monkeypatch.setattr(request, "to_image", draw)
        given = flags if not {"--resume", "--scene"} & set(more) else ()
        result = mgp5("story", *given, "--out", out, *more)
        assert result.exit_code == (130 if stop else code), result.stderr
        return result

    return tell


def files_of(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def test_a_story_that_was_interrupted_ends_as_if_it_had_not_been(tale, tmp_path):
    tale("whole")
    whole = tmp_path / "whole"
    for stop, given in ((2, ()), (4, ("--images", "pictures", "--text", "lines.txt", "--scenes", 3))):
        out = tmp_path / f"out-{stop}"
        tale(out.name, stop=stop)
        assert len(parts_of(out)) < len(parts_of(whole))
        result = tale(out.name, "--resume", *given)
        assert result.stderr.count("Scene ") == 5 - stop
        assert story_of(out) == story_of(whole) and files_of(out) == files_of(whole)
        made = [part["path"] for m in story_of(out)["messages"] for part in m["content"] if part["type"] == "image"]
        assert len(made) == 6 and all(same_pixels(out / name, whole / name) for name in made)
        assert (out / "story.html").read_text() == (whole / "story.html").read_text()
    assert "nothing was missing" in tale(out.name, "--resume").stderr


def test_a_story_goes_on_with_more_scenes_and_without_the_images_that_are_gone(tale, tmp_path):
    tale("out")
    shutil.rmtree(tmp_path / "pictures")
    result = tale("out", "--resume", "--scenes", 4)
    assert "10.jpg is not there any more" in result.stderr and result.stderr.count("Scene ") == 1
    assert len(parts_of(tmp_path / "out")) == 14
    assert "are not those of these images" in tale("out", "--resume", "--scenes", 1, code=2).stderr
    assert "with another seed, options" in tale("out", "--resume", "--seed", 2, "--steps", 1, code=2).stderr


def test_one_scene_is_made_anew(tale, tmp_path):
    tale("out")
    for scene, changed in ((2, [3]), (3, [5]), (5, [8, 9])):
        before, page = story_of(tmp_path / "out"), (tmp_path / "out/story.html").read_text()
        result = tale("out", "--scene", scene, "--seed", 7)
        after = story_of(tmp_path / "out")
        parts = [[part for m in story["messages"] for part in m["content"]] for story in (before, after)]
        assert [n for n, (old, new) in enumerate(zip(*parts, strict=True)) if old != new] == changed
        assert after["seed"] == before["seed"] and (tmp_path / "out/story.html").read_text() != page
        if scene != 2:
            assert f"the image before is still in out/{parts[0][changed[-1]]['path']}" in result.stderr
    for number, words in ((1, "are yours"), (7, "has 6 whole scenes")):
        assert words in tale("out", "--scene", number, code=2).stderr
    assert story_of(tmp_path / "out") == after


def test_a_story_is_overwritten_on_request_only(tale, tmp_path):
    tale("out")
    (tmp_path / "out/mine.txt").touch()
    assert "--resume" in tale("out", code=1).stderr
    tale("out", "--overwrite", "--scenes", 0, "--title", "Anew")
    assert story_of(tmp_path / "out")["title"] == "Anew"
    assert files_of(tmp_path / "out") == ["001.png", "002.jpg", "003.png", "mine.txt", "story.html", "story.json"]


@contextlib.contextmanager
def taken(folder: Path) -> Iterator[int]:
    """Another process that has a folder; gives its number."""
    read, write = os.pipe()
    if not (child := os.fork()):
        with contextlib.suppress(Mgp5Error):
            claim = Claim(folder)  # noqa: F841  (it is let go when the process ends)
            os.write(write, b".")
            signal.pause()
        os._exit(1)
    try:
        assert os.read(read, 1)
        yield child
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


@pytest.mark.parametrize(
    "command",
    [
        "story --text lines.txt --out out",
        "story --text lines.txt --out out --overwrite",
        "story --out out --resume",
        "chat --message hi --out out",
        "chat --message hi --resume out",
        "story --batch lines.txt --out out",
        "eval --format storyland --out out",
        "data storyland --out out",
        "train --stage finetune --model demo --data storyland/vist --out out",
    ],
)
def test_a_folder_that_another_program_writes_is_refused_at_once(mgp5, tmp_path, storyland, command):
    (tmp_path / "lines.txt").write_text("The fox sleeps.\n")
    (tmp_path / "storyland").symlink_to(storyland)
    if "--resume" in command:
        mgp5("story", "--text", "lines.txt", "--scenes", 0, "--out", "out")
    before = files_of(tmp_path / "out") if (tmp_path / "out").exists() else []
    with taken(tmp_path / "out") as process:
        name, *flags = command.split()
        result = mgp5(name, *flags) if name in ("story", "chat") else run(name, *flags)
        assert result.exit_code == 1 and not result.stdout
        assert "another process is at work in out (" in result.stderr and f"process {process}, since" in result.stderr
    assert files_of(tmp_path / "out") == sorted([*before, ".lock"])  # which the kill left
    with contextlib.closing(Claim(tmp_path / "out")):
        assert files_of(tmp_path / "out") == sorted([*before, ".lock"])


def run(*args: str):
    from click.testing import CliRunner

    return CliRunner().invoke(main, args)


# Pictures


@pytest.fixture
def mixed(tmp_path) -> Path:
    """A folder as people have them."""
    folder = tmp_path / "mixed"
    (folder / "old").mkdir(parents=True)
    picture("red").save(folder / "IMG_2.PNG")
    (folder / "IMG_2.TXT").write_bytes(b"\xef\xbb\xbfA red day.\r\n")
    picture("blue").save(folder / "IMG_10.avif")
    for name in ("Thumbs.db", ".DS_Store", "movie.mov", "alone.txt"):
        (folder / name).touch()
    return folder


def test_what_a_folder_holds_beside_pictures_is_named(mixed):
    told = []
    scenes = read_images([mixed], told.append)
    found = [(scene.image.path.name, scene.text) for scene in scenes]
    assert found == [("IMG_2.PNG", "A red day."), ("IMG_10.avif", "")]
    assert told == [f"left out of {mixed}: alone.txt, movie.mov, old/"]
    order = [mixed / "IMG_10.avif", mixed / "IMG_2.PNG"]
    assert [scene.image.path for scene in read_images(order)] == order


@pytest.mark.parametrize(
    ("name", "contents", "words"),
    [
        ("a.jpg", b"", "a.jpg is not an image"),
        ("b.heic", b"\0\0\0\x18ftypheic" + bytes(20), "b.heic is a HEIC image: pip install"),
        ("c.png", None, "no image at nowhere.png, where the link"),
    ],
)
def test_a_picture_that_cannot_be_read_is_named_and_left_out_on_request(mixed, monkeypatch, name, contents, words):
    monkeypatch.setitem(__import__("sys").modules, "pillow_heif", None)
    if contents is None:
        (mixed / name).symlink_to("nowhere.png")
    else:
        (mixed / name).write_bytes(contents)
    with pytest.raises(Mgp5Error, match=f"{words}.*--skip-bad"):
        read_images([mixed])
    told = []
    assert len(read_images([mixed], told.append, skip_bad=True)) == 2
    assert any(line.startswith("left out: ") and words in line for line in told)
    with pytest.raises(Mgp5Error, match="holds no image"):
        read_images([mixed / name], skip_bad=True)


def test_pictures_may_be_files_in_any_order(mgp5, pictures, tmp_path):
    result = mgp5("story", "--images", "pictures/10.jpg", "pictures/2.png", "--scenes", 0, "--out", "out")
    assert result.exit_code == 0, result.stderr
    parts = [part for message in story_of(tmp_path / "out")["messages"] for part in message["content"]]
    assert [part["path"] for part in parts if "path" in part] == ["001.jpg", "002.png"]


def test_only_line_breaks_part_lines(tmp_path):
    (tmp_path / "lines.txt").write_bytes("\ufeffA fox\u2028sleeps.\r\n\n It snows. \n".encode())
    assert [scene.text for scene in read_lines(tmp_path / "lines.txt")] == ["A fox\u2028sleeps.", "It snows."]

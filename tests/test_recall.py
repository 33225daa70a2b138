"""`mgp5 recall`: what it prints, run by a shell, gives the same pixels."""

import shutil
import subprocess
from contextlib import chdir
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import CliRunner
from tiny import picture, same_pixels

from mgp5.apps.recall import recall
from mgp5.cli import main
from mgp5.views.files import StoryFolder

pytestmark = pytest.mark.usefixtures("loads_once")


def run(*args: str):
    result = CliRunner().invoke(main, args)
    assert result.exit_code == 0, result.output
    return result


def drawn_again(path: Path, here: Path) -> bool:
    """Whether the command of an image makes the same one; the shell hands the command over to this process."""
    recalled = run("recall", str(path))
    stub = f"mgp5() {{ cat > {here}/stdin; pwd > {here}/pwd; printf '%s\\n' \"$@\" > {here}/args; }}\n"
    subprocess.run(["sh", "-c", stub + recalled.stdout], check=True, cwd="/")
    with chdir((here / "pwd").read_text().strip()):
        args = (here / "args").read_text().splitlines()
        assert CliRunner().invoke(main, args, input=(here / "stdin").read_bytes()).exit_code == 0
    made = Path(recalled.stderr.splitlines()[0].removeprefix("it will be "))
    return same_pixels(path, made)


@pytest.fixture(scope="module")
def story(tmp_path_factory, loads_once):
    """By the demo, in a folder whose name a shell would trip over: given, narrated, illustrated and two of its own."""
    home = tmp_path_factory.mktemp("recall")
    examples = Path(__file__).parents[1] / "examples/picnic"
    (home / "lines.txt").write_text('It\'s "cold" & a `red` fox sleeps.\n')
    out = home / "it's $HOME"
    flags = ["--text", str(home / "lines.txt"), "--scenes", "2", "--seed", "5", "--steps", "2", "--backend", "eager"]
    run("story", "--images", str(examples), *flags, "--set", "image_seed=9", "--out", str(out))
    return out


def test_the_last_picture_of_a_story(story, tmp_path):
    paths = [image.path for image in StoryFolder.open(story).load()[0].images]
    assert drawn_again(paths[-1], tmp_path)
    found = recall(paths[-3])
    assert '"max_tokens": 0' in found.line and "a `red` fox sleeps" in found.command and len(found.notes) == 1
    assert "--backend eager" in found.command


def test_pictures_of_a_story_of_which_a_scene_was_made_anew(story, tmp_path):
    again = shutil.copytree(story, story.with_name("again"))
    run("story", "--out", str(again), "--scene", "4", "--seed", "8")
    paths = [image.path for image in StoryFolder.open(again).load()[0].images]
    notes = [any("made anew since" in note for note in recall(path).notes) for path in paths[3:]]
    assert notes == [False, True, True] and drawn_again(paths[3], tmp_path)
    run("story", "--out", str(again), "--scene", "5", "--seed", "8")
    run("story", "--out", str(again), "--resume", "--scenes", "3", "--seed", "5")
    paths = [image.path for image in StoryFolder.open(again).load()[0].images]
    notes = [any("made anew since" in note for note in recall(path).notes) for path in paths[3:]]
    assert notes == [False, False, True, False]


def test_the_second_picture_of_a_chat(small_folder, tmp_path):
    flags = ["--model", str(small_folder), "--steps", "1", "--seed", "3", "--set", "max_tokens=4"]
    flags += ["--set", "image=always"]
    run("chat", *flags, "--backend", "eager", "--message", "one", "--message", "two", "--out", str(tmp_path / "talk"))
    path = StoryFolder.open(tmp_path / "talk").load()[0].images[-1].path
    assert drawn_again(path, tmp_path)
    again = Path(run("recall", "--run", str(path)).stderr.splitlines()[0].removeprefix("it will be "))
    assert same_pixels(path, again)


def test_what_is_missing_is_said_in_one_line(story, tmp_path):
    made = StoryFolder.open(story).load()[0].images[-1].path
    shutil.copy(made, tmp_path / "alone.png")
    picture().save(tmp_path / "mine.png")
    shutil.copy(made, story / "copy.png")
    for path, words in (
        (tmp_path / "alone.png", "story.json of its folder: that is missing"),
        (tmp_path / "mine.png", "does not say how it was drawn"),
        (story / "copy.png", "in no reply"),
        (tmp_path / "no.png", "no image at"),
    ):
        result = CliRunner().invoke(main, ["recall", str(path)])
        assert result.exit_code == 1 and words in result.stderr and result.stderr.count("\n") == 1
        assert not result.stdout


def test_a_character_that_the_terminal_lacks_ends_no_command(monkeypatch):
    monkeypatch.setattr("mgp5.apps.recall.recall", lambda path: SimpleNamespace(command="draw “é”", notes=[]))
    result = CliRunner(charset="latin-1").invoke(main, ["recall", "a.png"])
    assert result.exit_code == 0 and result.stdout_bytes.decode("latin-1") == "draw ?é?\n"


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_is_the_shells_own_code(shell):
    assert f"_MGP5_COMPLETE={shell}_complete" in run("completion", shell).stdout
    if shell == "bash":
        words = {"_MGP5_COMPLETE": "bash_complete", "COMP_WORDS": "mgp5 rec", "COMP_CWORD": "1"}
        assert CliRunner().invoke(main, [], env=words, prog_name="mgp5").stdout == "plain,recall\n"

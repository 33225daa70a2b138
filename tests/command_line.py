"""Commands in this process, for tests of whole runs of a head."""

import json
from contextlib import chdir
from pathlib import Path
from typing import Any

from accelerate.state import AcceleratorState
from click.testing import CliRunner
from serve_process import data_url
from tiny import parts_of

from mgp5.cli import main
from mgp5.views.files import read_png_metadata


def run(*args: object, home: Path, code: int = 0) -> str:
    """Run a command in a folder; return what it writes to stdout, or where it is refused to stderr."""
    AcceleratorState._reset_state(True)
    with chdir(home):
        result = CliRunner().invoke(main, list(map(str, args)), catch_exceptions=False)
    assert result.exit_code == code, result.output
    return result.stderr if code else result.stdout


def tell_and_recall(home: Path, *flags: object) -> dict[str, Any]:
    """Tell a story of one text and one more scene, and recall an image; return that one's metadata."""
    (home / "lines.txt").write_text("A red day.\n")
    given = ["--text", "lines.txt", "--scenes", 1, "--set", "image=always"]
    run("story", *flags, *given, "--out", "told", home=home)
    assert [kind for _, kind in parts_of(home / "told")].count("image") == 2
    (first, *_) = sorted((home / "told").glob("*.png"))
    assert "mgp5" in run("recall", first, home=home)
    return read_png_metadata(first)


def chat_and_evaluate(home: Path, *flags: object) -> None:
    """Chat with an image in the reply, and evaluate two samples of Storyland."""
    run("chat", *flags, "--message", "hello", "--set", "image=always", "--out", "talk", home=home)
    assert list((home / "talk").glob("*.png"))
    task = "--task", "first", "--task", "last", "--context", "full"
    told = run("eval", *flags, "--format", "storyland", "--limit", 1, *task, "--out", "eval", "--json", home=home)
    found = json.loads(told.splitlines()[-1])
    assert found["bytes"]["trained"] > 0 and found["tables"].keys() == {"first, none", "last, full"}
    drawn = found["tables"]["first, none"]["model"]
    assert drawn["images"] == 1 and 0 <= drawn["metrics"]["attributes"]["value"] <= 1


def ask_for_image(server: Any, **options: object) -> None:
    """Post a chat with an image to a server; its reply must have one."""
    image = {"type": "image_url", "image_url": {"url": data_url()}}
    ask = {"messages": [{"role": "user", "content": [image, {"type": "text", "text": "draw"}]}]}
    asked = {"image": "always", "max_tokens": 4, "response_format": {"type": "parts"}, **options}
    status, reply = server.post("/v1/chat/completions", **ask, **asked)
    assert status == 200, reply
    assert "image_url" in [part["type"] for part in reply["choices"][0]["message"]["content"]]

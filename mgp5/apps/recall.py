"""Find the command that draws an image of mgp5 again.

The image's PNG holds its seeds and options; the conversation that it was drawn in, and the model, are in the story.json
beside it. The command hands both to `mgp5 story --batch -`, see `batch`.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import __version__
from ..errors import Mgp5Error
from ..messages import Conversation
from ..views.files import STORY, StoryFolder, read_png_metadata
from ..views.html import scenes
from .earlier import ENGINE
from .inputs import SceneInput
from .story import WINDOW, scene_prompt

NOT_OPTIONS = {"version", "prompt", "seed", "text_seed"}  # of an image's metadata


@dataclass(frozen=True)
class Recalled:
    """What draws an image again: `mgp5` with these words, in this folder, with this line on its standard input."""

    words: list[str]
    folder: Path
    line: str
    notes: list[str]  # where the image will be, and why it may differ

    @property
    def command(self) -> str:
        """The command, several lines of shell."""
        home, text = shlex.quote(str(self.folder.resolve())), shlex.quote(self.line)
        return f"(cd {home} &&\n  printf '%s\\n' {text} |\n  mgp5 {shlex.join(self.words)})"

    def run(self) -> int:
        """Draw the image again by a process of its own; return its exit code."""
        command = [sys.executable, "-m", "mgp5", *self.words]
        return subprocess.run(command, input=self.line.encode(), cwd=self.folder, check=False).returncode


def recall(path: Path) -> Recalled:
    """Return what draws an image again. Raises Mgp5Error that says what the image or its folder lacks."""
    metadata, folder = read_png_metadata(path), path.parent
    if not {"seed", "text_seed"} <= metadata.keys():
        raise Mgp5Error(f"{path} does not say how it was drawn", "give a PNG that mgp5 drew, as it was written")
    if not (folder / STORY).is_file():
        found = f"{path} was drawn in a conversation, which is in the {STORY} of its folder: that is missing"
        raise Mgp5Error(found, f"its prompt was {json.dumps(metadata.get('prompt', ''))}, its seed {metadata['seed']}")
    conversation, story = StoryFolder.open(folder).load()
    prompt, index, limits, changed = _prompt(conversation, path, story)
    options = {name: value for name, value in metadata.items() if name not in NOT_OPTIONS} | limits
    options |= {"seed": metadata["text_seed"], "image_seed": metadata["seed"] - index}
    names = [image.path.relative_to(folder).as_posix() for image in prompt.images]
    line = {"messages": prompt.to_chat(iter(names)), "options": options}
    for part in (part for message in line["messages"] for part in message["content"]):
        part.pop("meta", None)
    out = f"recalled-{path.stem}"
    words = ["story", "--batch", "-", "--out", out, "--model", _absolute(story["model"])]
    for name in ENGINE:
        words += [f"--{name}", _absolute(story["options"][name])] if name in story["options"] else []
    notes = [f"it will be {folder / out / '000001' / f'{len(set(names)) + index + 1:03d}.png'}"]
    if any(name.endswith(".jpg") for name in names):
        notes.append("given JPEG pictures were kept anew, without private data: it will be close, not the same")
    if changed:
        notes.append("a scene that it was drawn from has been made anew since: it will be another picture")
    if metadata.get("version") != __version__:
        notes.append(f"it was drawn by mgp5 {metadata.get('version')}, and this is {__version__}")
    return Recalled(words, folder, json.dumps(line, ensure_ascii=False), notes)


def _prompt(
    conversation: Conversation, path: Path, story: Mapping[str, Any]
) -> tuple[Conversation, int, dict[str, Any], bool]:
    """Return the prompt that an image was drawn for, its index in the reply, and options that the PNG does not hold;
    and whether a scene of the prompt was made anew after it."""
    options = story["options"]
    messages = conversation.messages
    drawn = [[i.path and i.path.resolve() for i in m.images if m.role == "assistant"] for m in messages]
    number = next((number for number, paths in enumerate(drawn) if path.resolve() in paths), None)
    if number is None:
        hint = f"give an image that a reply of this {STORY} has"
        raise Mgp5Error(f"{path} is in no reply of the {STORY} beside it, expected in one", hint)
    if messages[0].role == "system":  # a chat, or a conversation of a batch
        limits = {name: options[name] for name in ("max_images",) if name in options}
        return Conversation(messages[:number]), drawn[number].index(path.resolve()), limits, False
    line = messages[number - 1] if number and messages[number - 1].role == "user" else None
    part = SceneInput(text=line.text) if line and not line.images else SceneInput()
    past = scenes(Conversation(messages[: number - 1 if part.text else number]))
    scene, order = len(past), story.get("anew", [])
    later = order[order.index(scene) + 1 :] if scene in order else order
    changed = any(scene - WINDOW <= other < scene for other in later)
    prompt = scene_prompt([(scene.text, scene.image) for scene in past if scene.image], part)
    return prompt, 0, {"max_images": 1}, changed


def _absolute(name: str) -> str:
    """Return the path of a folder as it is from anywhere; other names stay as they are."""
    return str(Path(name).resolve()) if Path(name).expanduser().is_dir() else name

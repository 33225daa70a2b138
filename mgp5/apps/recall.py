"""A picture that mgp5 has drawn -> the command that draws it again.

The picture's PNG says its seeds and options; the conversation it was drawn in, and the model, are in the story.json
beside it. The command hands both to `mgp5 story --batch -` (see `jobs`).
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from .. import __version__
from ..errors import Mgp5Error
from ..messages import Conversation, Image, Part
from ..views.files import STORY, StoryFolder, read_png_metadata
from ..views.html import scenes
from .story import SceneInput, scene_prompt

NOT_OPTIONS = {"version", "prompt", "seed", "text_seed"}  # of a picture's metadata
FLAGS = {"backend", "exported", "quantize"}  # in the options of a story.json, where they were given


def recall(picture: Path) -> tuple[str, list[str]]:
    """The command (several lines of shell), and notes: where the picture will be, and why it may differ.

    Raises:
        Mgp5Error: what the picture or its folder lacks.
    """
    meta = read_png_metadata(picture)
    if not {"seed", "text_seed"} <= meta.keys():
        found = f"{picture} does not say how it was drawn"
        raise Mgp5Error(found, "give a PNG that mgp5 drew, as it was written")
    folder = picture.parent
    if not (folder / STORY).is_file():
        found = f"{picture} was drawn in a conversation, which is in the {STORY} of its folder: that is missing"
        raise Mgp5Error(found, f"its prompt was {json.dumps(meta.get('prompt', ''))}, its seed {meta['seed']}")
    conversation, facts = StoryFolder.open(folder).load()
    question, index, limits = _asked(conversation, picture, facts["options"])
    options = {name: value for name, value in meta.items() if name not in NOT_OPTIONS} | limits
    options |= {"seed": meta["text_seed"], "image_seed": meta["seed"] - index}
    paths = [image.path.relative_to(folder).as_posix() for image in question.images]
    bare = [replace(m, content=tuple(map(_bare, m.content))) for m in question.messages]
    line = {"messages": Conversation(tuple(bare)).to_chat(iter(paths)), "options": options}
    out = f"recalled-{picture.stem}"
    flags = ["--batch", "-", "--out", out, "--model", _place(facts["model"])]
    for name in FLAGS & facts["options"].keys():
        flags += [f"--{name}", _place(facts["options"][name])]
    text = shlex.quote(json.dumps(line, ensure_ascii=False))
    lines = (
        f"(cd {shlex.quote(str(folder.resolve()))} &&",
        f"  printf '%s\\n' {text} |",
        f"  mgp5 story {shlex.join(flags)})",
    )
    place = folder / out / "000001" / f"{len(set(paths)) + index + 1:03d}.png"
    return "\n".join(lines), [f"it will be {place}", *_doubts(paths, meta)]


def _doubts(paths: Sequence[str], meta: dict[str, Any]) -> list[str]:
    """Why the picture may not be the same."""
    doubts = []
    if any(path.endswith(".jpg") for path in paths):
        doubts.append("given JPEG pictures were kept anew, without private data: it will be close, not the same")
    if meta.get("version") != __version__:
        doubts.append(f"it was drawn by mgp5 {meta.get('version')}, and this is {__version__}")
    return doubts


def _asked(conversation: Conversation, picture: Path, options: dict[str, Any]) -> tuple[Conversation, int, dict]:
    """What was asked when a picture was drawn, which picture of the reply it is, and options that it does not note."""
    messages = conversation.messages
    place = picture.resolve()
    drawn = [[i.path and i.path.resolve() for i in m.images if m.role == "assistant"] for m in messages]
    number = next((number for number, paths in enumerate(drawn) if place in paths), None)
    if number is None:
        raise Mgp5Error(f"{picture} is in no reply of the {STORY} beside it", "it was taken back, or is from elsewhere")
    if messages[0].role == "system":  # a chat, or a conversation of a batch
        limits = {name: options[name] for name in ("max_images",) if name in options}
        return Conversation(messages[:number]), drawn[number].index(place), limits
    line = messages[number - 1] if number and messages[number - 1].role == "user" else None
    part = SceneInput(text=line.text) if line and not line.images else None
    past = scenes(Conversation(messages[: number - 1 if part else number]))
    return scene_prompt([(scene.text, scene.image) for scene in past if scene.image], part), 0, {"max_images": 1}


def _bare(part: Part) -> Part:
    return replace(part, meta={}) if isinstance(part, Image) else part


def _place(name: str) -> str:
    """A folder from here as it is from anywhere; other names as they are."""
    return str(Path(name).resolve()) if Path(name).expanduser().is_dir() else name

"""Write a story or a chat as one self-contained page: style and images are inline, and there are no scripts."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any, Literal

from ..files import write_text
from ..messages import Conversation, Image, Message, Text

MAX_BYTES, MAX_SIDE = 1_500_000, 1600  # a larger image goes into the page as a JPEG of at most MAX_SIDE pixels
MAGIC = {b"\x89PNG": "image/png", b"\xff\xd8\xff": "image/jpeg", b"RIFF": "image/webp", b"GIF8": "image/gif"}

STYLE = (Path(__file__).parent / "page.css").read_text(encoding="utf-8")
PAGE = """<!DOCTYPE html>
<html lang="{lang}">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="generator" content="mgp5">
<link rel="icon" href="data:,">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<header><h1>{title}</h1></header>
<main>
{body}
</main>
<footer><p>{footer}</p></footer>
</body>
</html>
"""


@dataclass(frozen=True)
class Scene:
    """One page of the story: an image, its text, or both."""

    text: str = ""
    image: Image | None = None


def write_html(
    conversation: Conversation, meta: Mapping[str, Any], path: Path, *, kind: Literal["story", "chat"] = "story"
) -> None:
    """Write the page.

    Args:
        conversation: what to show; images are read from their files or from memory.
        meta: `title`, `model`, `seed`, `options` (with `steps`, ...), `lang`, all optional, as in story.json.
        path: the page to write; an older one is replaced.
        kind: a story shows scenes, see `scenes`; a chat shows every message.

    Raises:
        Mgp5Error: an image cannot be read, or the page cannot be written.
    """
    if kind == "story":
        body = [_scene(scene, number) for number, scene in enumerate(scenes(conversation), 1)]
    else:
        body = [_turn(message) for message in conversation.messages]
    page = PAGE.format(
        lang=escape(str(meta.get("lang") or "en")),
        title=escape(str(meta.get("title") or ("A picture story" if kind == "story" else "A conversation"))),
        style=STYLE,
        body="\n".join(body),
        footer=escape(_colophon(meta)),
    )
    write_text(path, page)


def scenes(conversation: Conversation) -> list[Scene]:
    """Return the scenes of a story that `apps.recorder` has recorded.

    Each message holds one scene, or the user's message holds its text or its image and the reply the other. System
    messages are left out; of a message with several images, each one makes a scene with the text around it.
    """
    found: list[Scene] = []
    incomplete = False  # the last scene is the user's, and a reply completes it
    for message in conversation.messages:
        if message.role == "system":
            continue
        new = _split(message)
        if incomplete and message.role == "assistant":
            reply, last = new.pop(0) if new else Scene(), found.pop()
            found.append(Scene(last.text or reply.text, last.image or reply.image))
        found += new
        incomplete = message.role == "user" and bool(new) and not (new[-1].text and new[-1].image)
    return found


def _split(message: Message) -> list[Scene]:
    """Return the scenes of one message: a new one begins where the last has an image and a text."""
    found: list[Scene] = []
    for part in message.content:
        image, text = (part, "") if isinstance(part, Image) else (None, part.text.strip())
        if not (image or text):
            continue
        if not found or (found[-1].image and (found[-1].text or image)):
            found.append(Scene())
        last = found[-1]
        found[-1] = Scene(f"{last.text} {text}".strip(), image or last.image)
    return found


def _scene(scene: Scene, number: int) -> str:
    """Return the HTML of a scene."""
    caption = f"<p>{escape(scene.text)}</p>" if scene.text else ""
    content = _figure(scene.image, scene.text, f"Picture {number}", caption) if scene.image else caption
    return f'<section class="scene">\n{content}\n<div class="number" aria-hidden="true">{number}</div>\n</section>'


def _turn(message: Message) -> str:
    """Return the HTML of a chat's message."""
    parts = []
    for part in message.content:
        if isinstance(part, Text):
            parts.append(f"<p>{escape(part.text.strip())}</p>" if part.text.strip() else "")
        else:
            parts.append(_figure(part, message.text, "Picture", ""))
    if message.role == "system":
        return f'<div class="system">{"".join(parts)}</div>'
    who = "You" if message.role == "user" else "Model"
    return f'<article class="turn {message.role}"><h2 class="who">{who}</h2>{"".join(parts)}</article>'


def _figure(image: Image, text: str, name: str, caption: str) -> str:
    """Return the HTML of an image with its caption; its metadata is folded away below it."""
    words = image.caption or text or str(image.meta.get("prompt") or "")
    alt = escape(f"{name}: {words}" if words else name)
    uri, (width, height) = _data_uri(image)
    below = caption + _details(image.meta)
    below = f"\n<figcaption>{below}</figcaption>" if below else ""
    return f'<figure>\n<img src="{uri}" width="{width}" height="{height}" alt="{alt}">{below}\n</figure>'


def _details(meta: Mapping[str, Any]) -> str:
    """Return the HTML of an image's metadata, "" without any."""
    if not meta:
        return ""
    brief = _brief(meta) or "how this picture was made"
    rows = "".join(f"<dt>{escape(str(key))}</dt><dd>{escape(str(value))}</dd>" for key, value in meta.items())
    return f"<details><summary>{escape(brief)}</summary><dl>{rows}</dl></details>"


def _brief(meta: Mapping[str, Any]) -> str:
    """Return seed, steps and guidance in one line, as far as they are known."""
    forms = {"seed": "seed {}", "steps": "{} steps", "guidance": "guidance {}"}
    return " · ".join(form.format(meta[key]) for key, form in forms.items() if meta.get(key) is not None)


def _colophon(meta: Mapping[str, Any]) -> str:
    """Return the last line of the page: what the story was made with."""
    options = meta.get("options") or {}
    model = f"model {meta['model']}" if meta.get("model") else ""
    facts = _brief({"seed": meta.get("seed"), "steps": options.get("steps"), "guidance": options.get("guidance")})
    return " · ".join(part for part in ("Made with mgp5", model, facts) if part)


def _data_uri(image: Image) -> tuple[str, tuple[int, int]]:
    """Return an image as a data: URI, and its size in pixels; a small file that browsers know goes in as it is."""
    picture, data = image.load(), b""
    if image.pixels is None and image.path is not None and image.path.stat().st_size <= MAX_BYTES:
        data = image.path.read_bytes()
    kind = next((kind for magic, kind in MAGIC.items() if data.startswith(magic)), "")
    if not kind:
        buffer = io.BytesIO()
        picture.save(buffer, "PNG")
        kind, data = "image/png", buffer.getvalue()
    if len(data) > MAX_BYTES:
        picture.thumbnail((MAX_SIDE, MAX_SIDE))
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=88)
        kind, data = "image/jpeg", buffer.getvalue()
    return f"data:{kind};base64,{base64.b64encode(data).decode('ascii')}", picture.size

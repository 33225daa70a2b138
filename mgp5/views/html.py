"""Write a story or a chat as one self-contained page: style and images are inline, and there are no scripts."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any, Literal

from ..files import write_text
from ..messages import Conversation, Image, Message
from .files import encode

MAX_BYTES, MAX_SIDE = 1_500_000, 1600  # of an image in the page, see `data_uri`
MAGIC = {b"\x89PNG": "image/png", b"\xff\xd8\xff": "image/jpeg", b"RIFF": "image/webp", b"GIF8": "image/gif"}

PAGE, STYLE = (Path(__file__).with_name(f"page.{kind}").read_text(encoding="utf-8") for kind in ("html", "css"))


@dataclass(frozen=True)
class Scene:
    """One page of the story: an image, its text, or both."""

    text: str = ""
    image: Image | None = None


def write_html(
    conversation: Conversation, meta: Mapping[str, Any], path: Path, *, kind: Literal["story", "chat"] = "story"
) -> None:
    """Write the page: of a story its scenes, of a chat every message but the system's.

    `meta` may hold `title`, `model`, `seed`, `options` and `lang`, as story.json. Raises Mgp5Error if an image cannot
    be read, or the page not be written.
    """
    if kind == "story":
        body = [_scene(scene, number) for number, scene in enumerate(scenes(conversation), 1)]
    else:
        body = [_turn(message) for message in conversation.messages if message.role != "system"]
    page = PAGE.format(
        lang=escape(str(meta.get("lang") or "en")),
        title=escape(str(meta.get("title") or ("A picture story" if kind == "story" else "A conversation"))),
        style=STYLE,
        body="\n".join(body),
        footer=escape(_colophon(meta)),
    )
    write_text(path, page)


def scenes(conversation: Conversation) -> list[Scene]:
    """Return the scenes of a story: one a message, or the user's text or image with what the reply adds to it.
    System messages are left out; of a message with several images, each one makes a scene with the text around it."""
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
    caption = f"<p>{escape(scene.text)}</p>" if scene.text else ""
    content = _figure(scene.image, scene.text, f"Picture {number}", caption) if scene.image else caption
    return f'<section class="scene">\n{content}\n<div class="number" aria-hidden="true">{number}</div>\n</section>'


def _turn(message: Message) -> str:
    parts = []
    for part in message.content:
        if isinstance(part, Image):
            parts.append(_figure(part, message.text, "Picture", ""))
        elif text := part.text.strip():
            parts.append(f"<p>{escape(text)}</p>")
    who = "You" if message.role == "user" else "Model"
    return f'<article class="turn {message.role}"><h2 class="who">{who}</h2>{"".join(parts)}</article>'


def _figure(image: Image, text: str, name: str, caption: str) -> str:
    """Return the HTML of an image with its caption; its metadata is folded away below it."""
    words = image.caption or text or str(image.meta.get("prompt") or "")
    alt = escape(f"{name}: {words}" if words else name)
    uri, (width, height) = data_uri(image)
    below = caption + _details(image.meta)
    below = f"\n<figcaption>{below}</figcaption>" if below else ""
    return f'<figure>\n<img src="{uri}" width="{width}" height="{height}" alt="{alt}">{below}\n</figure>'


def _details(meta: Mapping[str, Any]) -> str:
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
    model = f"model {meta['model']}" if meta.get("model") else ""
    options = _brief({**(meta.get("options") or {}), "seed": meta.get("seed")})
    return " · ".join(part for part in ("Made with mgp5", model, options) if part)


def data_uri(image: Image, max_bytes: int = MAX_BYTES, max_side: int = MAX_SIDE) -> tuple[str, tuple[int, int]]:
    """Return an image as a data: URI, and its size in pixels.

    A file that browsers know goes in as it is, other images as PNG; more than `max_bytes` become a JPEG of at most
    `max_side` pixels. Raises Mgp5Error if the image cannot be read.
    """
    picture, data = image.load(), b""
    if image.pixels is None and image.path is not None and image.path.stat().st_size <= max_bytes:
        data = image.path.read_bytes()
    kind = next((kind for magic, kind in MAGIC.items() if data.startswith(magic)), "")
    if not kind:
        kind, data = "image/png", encode(picture, "PNG")
    if len(data) > max_bytes:
        picture.thumbnail((max_side, max_side))
        kind, data = "image/jpeg", encode(picture, "JPEG", quality=88)
    return f"data:{kind};base64,{base64.b64encode(data).decode('ascii')}", picture.size

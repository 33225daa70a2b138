"""The paper's three tasks as one job: narrate pictures, illustrate sentences, continue with scenes of one's own."""

from __future__ import annotations

import re
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ..errors import Mgp5Error
from ..events import Event, Finished, ImageDone, SceneStart, TextChunk
from ..messages import Conversation, Image, Message, Text
from ..prompts import Context, Scene, continue_, illustrate, narrate

if TYPE_CHECKING:
    from ..inference.session import Session
    from ..model import InterleavedModel
    from ..options import Options

WINDOW = 4  # scenes of history that a prompt shows: stories of five scenes are what models are trained on
SEEDS = 100  # from a scene, or a reply of a chat, to the next; its pictures count up by one
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")


@dataclass(frozen=True)
class SceneInput:
    """What the user brings: a picture with or without its text, or a text without a picture."""

    image: Image | None = None
    text: str = ""


def read_folder(folder: Path) -> list[SceneInput]:
    """The pictures of a folder in natural order (2 before 10), each with the text of the same stem if there is one.

    Every picture is opened here, so that a broken one is told before any work is done.

    Raises:
        Mgp5Error: no such folder, no picture in it, or one that cannot be read.
    """
    if not folder.is_dir():
        raise Mgp5Error(f"--images {folder} is not a folder", "give a folder of pictures", usage=True)
    try:
        found = [f for f in folder.iterdir() if f.suffix.lower() in SUFFIXES and f.name[0] != "." and f.is_file()]
    except OSError as error:
        raise Mgp5Error(f"--images {folder} cannot be read ({error.strerror})", "check its permissions") from None
    files = sorted(found, key=natural)
    if not files:
        raise Mgp5Error(f"--images {folder} holds no picture", f"expected files with {', '.join(SUFFIXES)}", usage=True)
    given = []
    for file in files:
        Image(path=file).load()
        note = file.with_suffix(".txt")
        given.append(SceneInput(Image(path=file), read_text(note).strip() if note.is_file() else ""))
    return given


def read_lines(path: Path) -> list[SceneInput]:
    """Each line of a text file that is not blank, as a scene to illustrate."""
    lines = [SceneInput(text=line.strip()) for line in read_text(path).splitlines() if line.strip()]
    if not lines:
        raise Mgp5Error(f"--text {path} is empty", "write one scene per line", usage=True)
    return lines


def read_text(path: Path) -> str:
    """A text file. Raises Mgp5Error when it cannot be read as UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise Mgp5Error(f"no text file at {path}", "check the path", usage=True) from None
    except (OSError, UnicodeDecodeError) as error:
        raise Mgp5Error(f"{path} cannot be read as UTF-8 text ({error})", "save it as UTF-8") from None


def natural(path: Path) -> list[tuple[int, int | str]]:
    """Sort key by which picture2 comes before picture10."""
    pieces = re.split(r"(\d+)", path.name.lower())
    return [(0, int(piece)) if piece.isdigit() else (1, piece) for piece in pieces]


def tell(model: InterleavedModel, given: Sequence[SceneInput], scenes: int, options: Options) -> Iterator[Event]:
    """Go through what is given, then continue with `scenes` scenes; yields events scene by scene.

    Every scene has seeds of its own, derived from `options.seed` and its number, so that it does not depend on how
    many tokens the scenes before took.
    """
    from ..inference.session import Session

    history: list[Scene] = []
    # One for all scenes: pictures are encoded once. It reads each question anew, so that a scene is what it is alone.
    session = Session(model.backbone, reuse=False)
    for number in range(len(given) + scenes):
        part = given[number] if number < len(given) else None
        yield SceneStart(number, kind(part), len(given) + scenes)
        text, image = yield from _scene(model, session, history, part, with_scene_seed(options, number))
        if image is not None:
            history.append((text, image))


def _scene(
    model: InterleavedModel, session: Session, history: list[Scene], part: SceneInput | None, options: Options
) -> Generator[Event, None, tuple[str, Image | None]]:
    """One scene; returns its text and image."""
    from ..inference.reply import generate

    if part is not None and part.image is not None:
        yield ImageDone(0, part.image)
    if part is not None and part.text:
        yield TextChunk(part.text)
    asked = ask(history, part, options, model.config.narrate_from)
    reply = to_message(part)
    if asked is None:
        yield Finished(reply, "stop")
    for event in generate(model, *asked, session) if asked else ():
        if isinstance(event, Finished):
            reply = event.message
        yield event
    return scene_result(part, reply)


def ask(
    history: Sequence[Scene], part: SceneInput | None, options: Options, narrate_from: Context
) -> tuple[Conversation, Options] | None:
    """What the model is asked for a scene, and how it replies; None where nothing is missing.

    Args:
        history: text and picture of every scene before.
        part: what the user gave of it; None for one that the model continues with.
        options: with the seeds of the scene, see `with_scene_seed`.
        narrate_from: what a question for a text shows of the history.
    """
    past = history[-WINDOW:]
    if part is None:
        return continue_(past), replace(options, draw="always", max_images=1)
    if part.image is None:
        return illustrate(past, part.text), replace(options, draw="always", max_images=1, max_tokens=0)
    return None if part.text else (narrate(past, part.image, context=narrate_from), replace(options, draw="never"))


def to_message(part: SceneInput | None) -> Message:
    """What the user gave of a scene, as a message."""
    content = (part.image, part.text and Text(part.text)) if part is not None else ()
    return Message("user", tuple(piece for piece in content if piece))


def scene_result(part: SceneInput | None, reply: Message) -> tuple[str, Image | None]:
    """Text and picture of a scene: what was given of it, else what was replied."""
    text, image = (part.text, part.image) if part is not None else ("", None)
    return text or reply.text, image or (reply.images or (None,))[0]


def with_scene_seed(options: Options, number: int) -> Options:
    """The options with the seeds of a scene."""
    image_seed = options.seed if options.image_seed is None else options.image_seed
    return replace(options, seed=options.seed + SEEDS * number, image_seed=image_seed + SEEDS * number)


def as_conversation(events: Sequence[tuple[SceneStart, str, Image | None]]) -> Conversation:
    """Scenes as a conversation: what the user gave is the user's, what the model made is the assistant's."""
    conversation = Conversation()
    for start, text, image in events:
        words = [Text(text)] if text else []
        picture = [image] if image is not None else []
        if start.kind == "given":
            conversation = conversation.add("user", *picture, *words)
        elif start.kind == "narrated":
            conversation = conversation.add("user", *picture).add("assistant", *words)
        elif start.kind == "illustrated":
            conversation = conversation.add("user", *words).add("assistant", *picture)
        else:
            conversation = conversation.add("assistant", *words, *picture)
    return conversation


class Record:
    """Follows the events of a story and keeps its scenes; used to save after each scene and on interruption."""

    def __init__(self) -> None:
        self.scenes: list[tuple[SceneStart, str, Image | None]] = []
        self._text = ""

    def __call__(self, event: Event) -> bool:
        """Take an event; True when a scene is complete."""
        if isinstance(event, SceneStart):
            self.scenes.append((event, "", None))
            self._text = ""
        elif isinstance(event, TextChunk):
            self._text += event.text
            self._replace(text=self._text.strip())
        elif isinstance(event, ImageDone):
            self._replace(image=event.image)
        elif isinstance(event, Finished) and event.message.text:
            self._replace(text=event.message.text)  # as history tells it, blanks between its pieces
        return isinstance(event, Finished)

    @property
    def made(self) -> bool:
        """Whether the model has added anything yet."""
        return any(message.role == "assistant" and message.content for message in self.conversation.messages)

    @property
    def conversation(self) -> Conversation:
        """The story so far."""
        return as_conversation([scene for scene in self.scenes if scene[1] or scene[2] is not None])

    def _replace(self, text: str | None = None, image: Image | None = None) -> None:
        start, old_text, old_image = self.scenes[-1]
        self.scenes[-1] = (start, old_text if text is None else text, old_image if image is None else image)


def kind(part: SceneInput | None) -> Literal["given", "narrated", "illustrated", "continued"]:
    """Who makes what of a scene."""
    if part is None:
        return "continued"
    if part.image is None:
        return "illustrated"
    return "given" if part.text else "narrated"

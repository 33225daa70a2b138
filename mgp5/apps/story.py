"""Tell a story: narrate images, illustrate texts, continue in both; the three tasks of the paper as one job."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import Mgp5Error, raise_all
from ..events import Event, Finished, ImageDone, SceneKind, SceneStart, TextChunk
from ..files import read_text, text_lines
from ..messages import Conversation, Image, Message, Text
from ..options import ModelRequest, Options, unexpected
from ..prompts import Context, Scene, continue_, illustrate, narrate
from ..views.files import StoryFolder, keep_images
from ..views.html import write_html
from .open_model import Tell, open_model, silent
from .recorder import Recorder, StoryScene

if TYPE_CHECKING:
    from ..model import InterleavedModel

WINDOW = 4  # scenes of history that a prompt shows: models are trained on stories of five scenes
SEEDS = 100  # between the seeds of two scenes, or of two replies of a chat; images of one reply count up by one
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")

Ask = tuple[Conversation, Options]  # a prompt, and how to reply to it


@dataclass(frozen=True)
class SceneInput:
    """What the user gives of a scene: image, text, both, or nothing, where the model continues."""

    image: Image | None = None
    text: str = ""

    @property
    def kind(self) -> SceneKind:
        """Which parts are given."""
        if self.image:
            return "given" if self.text else "narrated"
        return "illustrated" if self.text else "continued"


@dataclass(frozen=True, kw_only=True)
class StoryRequest:
    """Scenes of `images`, `text` and `inputs`, then the model's own. Raises Mgp5Error with all that is wrong."""

    images: Path | None = None  # folder of images, each with a .txt file of the same stem or without
    text: Path | None = None  # file with one scene to illustrate per line
    inputs: tuple[SceneInput, ...] = ()  # scenes in memory
    scenes: int = 1  # that the model adds
    out: Path | None = None  # new folder for the story; None writes nothing
    title: str = ""  # heading of the page
    model: ModelRequest = field(default_factory=ModelRequest)
    options: Options = field(default_factory=Options)  # of every reply; seeds count up by SEEDS from scene to scene

    def __post_init__(self) -> None:
        problems = []
        if not (self.images or self.text or self.inputs):
            problems.append("there is no story to continue: give --images DIR, --text FILE or both")
        if self.images and not self.images.is_dir():
            problems.append(f"--images {self.images} is not a folder: give a folder of images")
        if self.text and not self.text.exists():
            problems.append(f"no text file at {self.text}: check the path")
        raise_all(problems + unexpected(self, scenes=(self.scenes >= 0, "0 or more")))

    def read_inputs(self) -> list[SceneInput]:
        """Read what the user gives of each scene. Raises Mgp5Error for a file that cannot be read."""
        given = [*(read_folder(self.images) if self.images else ()), *(read_lines(self.text) if self.text else ())]
        return [*given, *self.inputs, *[SceneInput()] * self.scenes]

    def record(self) -> dict[str, Any]:
        """Return what story.json keeps of the request."""
        options = recorded_options(self.model, self.options)
        return {"model": self.model.model, "seed": self.options.seed, "options": options, "title": self.title}


def recorded_options(model: ModelRequest, options: Options) -> dict[str, Any]:
    """Return the options that story.json keeps: those that are set, without the seed, and those of the engine."""
    values = {name: value for name, value in options.flat().items() if value is not None and name != "seed"}
    return values | model.given()


def read_folder(folder: Path) -> list[SceneInput]:
    """Return the images of a folder in natural order, each with the text of the same stem, if any."""
    try:
        files = [f for f in folder.iterdir() if f.suffix.lower() in SUFFIXES and f.name[0] != "." and f.is_file()]
    except OSError as error:
        raise Mgp5Error(f"--images {folder} cannot be read ({error.strerror})", "check its permissions") from None
    if not files:
        raise Mgp5Error(f"--images {folder} holds no image", f"expected files with {', '.join(SUFFIXES)}", usage=True)
    notes = [(file, file.with_suffix(".txt")) for file in sorted(files, key=natural)]
    return [SceneInput(read_image(file), read_text(note).strip() if note.is_file() else "") for file, note in notes]


def read_image(path: Path) -> Image:
    """Return the image of a file, opened once, so that a broken one is reported before any work is done."""
    image = Image(path=path)
    image.load()
    return image


def read_lines(path: Path) -> list[SceneInput]:
    """Return each line of a text file that is not blank as a scene to illustrate."""
    lines = [SceneInput(text=line) for line in text_lines(read_text(path))]
    if not lines:
        raise Mgp5Error(f"--text {path} is empty", "write one scene per line", usage=True)
    return lines


def natural(path: Path) -> list[tuple[int, int | str]]:
    """Return a sort key of file names by which page2 comes before page10."""
    pieces = re.split(r"(\d+)", path.name.lower())
    return [(0, int(piece)) if piece.isdigit() else (1, piece) for piece in pieces]


def tell_story(request: StoryRequest, model: InterleavedModel | None = None, tell: Tell = silent) -> Iterator[Event]:
    """Tell a story; yields its events scene by scene.

    With `request.out`, the folder gets every image at once, story.json after every scene, and the page at the end. What
    was made is kept on an error or interruption too; close the generator (`contextlib.closing`) to have that done.
    Raises Mgp5Error for an input that cannot be read, a wrong model or a folder that is taken, before anything is made.

    Args:
        model: an open model; None opens `request.model`.
        tell: is given lines for the user, see `open_model`, and at last where the story is.
    """
    from ..hub import resolve

    inputs = request.read_inputs()
    if model is None:
        resolve(request.model.model)  # a wrong name is reported before a folder is made
    folder = StoryFolder.create(request.out) if request.out else None
    recorder, complete = Recorder(), False
    try:
        events = _events(model or open_model(request.model, tell), inputs, request.options)
        with closing(keep_images(events, folder) if folder else events) as events:
            for event in events:
                recorder(event)
                if folder and isinstance(event, Finished) and recorder.generated:
                    folder.save(recorder.conversation, **request.record())
                yield event
        complete = True
    finally:
        if folder and (complete or recorder.generated):
            folder.save(recorder.conversation, **request.record())
            write_html(*folder.load(), folder.path / "story.html")
            tell(f"The story is in {folder.path / 'story.html'}")
        elif folder:
            folder.discard()


def _events(model: InterleavedModel, inputs: Sequence[SceneInput], options: Options) -> Iterator[Event]:
    """Yield the events of all scenes: for each SceneStart, what the user gave of it, then the model's reply."""
    from ..inference.reply import generate
    from ..inference.session import Session

    scenes: list[StoryScene] = []
    # One session for all scenes: images are encoded once. It reads each prompt anew, so that a scene does not depend
    # on the calls before.
    session = Session(model, reuse=False)
    for number, part in enumerate(inputs):
        yield SceneStart(number, part.kind, len(inputs))
        if part.image:
            yield ImageDone(0, part.image)
        if part.text:
            yield TextChunk(part.text)
        if asked := scene_request(scenes, part, options, model.config.narrate_from):
            for event in generate(model, *asked, session):
                if isinstance(event, Finished):
                    scenes.append(finished_scene(part, event.message))
                yield event
        else:
            scenes.append(finished_scene(part))
            yield Finished(Message("user", (part.image, Text(part.text))), "stop")


def scene_request(
    before: Sequence[StoryScene], part: SceneInput, options: Options, narrate_from: Context = "full"
) -> Ask | None:
    """Return the prompt and the options of the reply that completes a scene; None where nothing is missing.

    Every scene has seeds of its own, derived from those of the story and its number, so that it does not depend on how
    many tokens the scenes before took.

    Args:
        before: all scenes before this one.
        options: of the story.
        narrate_from: how much of the history a prompt for a text shows: the model's `config.narrate_from`.
    """
    prompt = scene_prompt([(scene.text, scene.image) for scene in before if scene.image], part, narrate_from)
    if prompt is None:
        return None
    options = with_seeds(options, len(before))
    if part.image:
        return prompt, replace(options, draw="never")
    max_tokens = 0 if part.text else options.max_tokens
    return prompt, replace(options, draw="always", max_images=1, max_tokens=max_tokens)


def with_seeds(options: Options, number: int) -> Options:
    """Return options with the seeds of scene or reply `number`, from 0."""
    shift = SEEDS * number
    image_seed = None if options.image_seed is None else options.image_seed + shift
    return replace(options, seed=options.seed + shift, image_seed=image_seed)


def scene_prompt(history: Sequence[Scene], part: SceneInput, narrate_from: Context = "full") -> Conversation | None:
    """Return the prompt for what is missing of a scene: text, image or both; None where nothing is missing.

    `history` is text and image of the scenes before that have an image; the last WINDOW of them are shown.
    """
    past = history[-WINDOW:]
    match part.kind:
        case "continued":
            return continue_(past)
        case "illustrated":
            return illustrate(past, part.text)
        case "narrated":
            return narrate(past, part.image, context=narrate_from)
    return None


def finished_scene(part: SceneInput, reply: Message | None = None) -> StoryScene:
    """Return the scene of what the user gave of it and what the model replied."""
    reply = reply or Message("assistant", ())
    return StoryScene(part.kind, part.text or reply.text, part.image or next(iter(reply.images), None))

"""Tell a story: narrate images, illustrate texts, continue in both; the three tasks of the paper as one job."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import Mgp5Error, raise_all
from ..events import Event, Finished, ImageDone, SceneStart, TextChunk
from ..messages import Conversation, Image, Message, Text
from ..options import ModelRequest, Options, unexpected
from ..prompts import Context, Scene, continue_, illustrate, narrate
from ..views.files import StoryFolder, keep_images
from ..views.html import write_html
from .earlier import Earlier, take_up
from .inputs import SceneInput, read_images, read_lines
from .open_model import Tell, open_model, silent
from .recorder import Recorder, StoryScene, story_conversation
from .world import remarks

if TYPE_CHECKING:
    from ..model import InterleavedModel

WINDOW = 4  # scenes of history that a prompt shows: models are trained on stories of five scenes
SEEDS = 100  # between the seeds of two scenes, or of two replies of a chat; images of one reply count up by one

Ask = tuple[Conversation, Options]  # a prompt, and how to reply to it


@dataclass(frozen=True, kw_only=True)
class StoryRequest:
    """Scenes of `images`, `text` and `inputs`, then the model's own. Raises Mgp5Error with all that is wrong."""

    images: Path | Sequence[Path] = ()  # files, and folders, of images, each with a .txt file of the same stem or not
    text: Path | None = None  # file with one scene to illustrate per line
    inputs: tuple[SceneInput, ...] = ()  # scenes in memory
    scenes: int | None = None  # that the model adds; None: 1, or as many as the story in `out` was to have
    skip_bad: bool = False  # leave out images that cannot be read
    out: Path | None = None  # new folder for the story; None writes nothing
    resume: bool = False  # make the scenes that the story in `out` lacks; inputs may be given again, or not
    scene: int | None = None  # make this scene of the story in `out` anew, from 1
    overwrite: bool = False  # remove the story in `out`
    title: str = ""  # heading of the page
    model: ModelRequest = field(default_factory=ModelRequest)
    options: Options = field(default_factory=Options)  # of every reply; seeds count up by SEEDS from scene to scene

    def __post_init__(self) -> None:
        problems, paths = [], self.paths
        if not (paths or self.text or self.inputs or self.again):
            problems.append("there is no story to continue: give --images PATH, --text FILE or both")
        problems += [f"--images {path} is not there: give folders or files" for path in paths if not path.exists()]
        if self.text and not self.text.exists():
            problems.append(f"no text file at {self.text}: check the path")
        if self.resume + self.overwrite + (self.scene is not None) > 1:
            problems.append("--resume, --overwrite and --scene were given together: give one of them")
        if self.again and not self.out:
            problems.append("--resume and --scene need the folder of the story: give --out DIR")
        if self.scene is not None and (paths or self.text or self.inputs):
            problems.append("--scene goes without --images and --text: the story has them")
        rules = {"scenes": (self.scenes is None or self.scenes >= 0, "0 or more")}
        rules["scene"] = (self.scene is None or self.scene >= 1, "1 or more")
        raise_all(problems + unexpected(self, **rules))

    @property
    def again(self) -> bool:
        """Whether the story is there already, and is not to be overwritten."""
        return self.resume or self.scene is not None

    @property
    def paths(self) -> tuple[Path, ...]:
        """All of `images`."""
        return (self.images,) if isinstance(self.images, Path) else tuple(self.images or ())

    def read_inputs(self, tell: Tell = silent) -> list[SceneInput]:
        """Read what the user gives; `tell` is that of `read_images`. Raises Mgp5Error if a file cannot be read."""
        images = read_images(self.paths, tell, self.skip_bad) if self.paths else ()
        return [*images, *(read_lines(self.text) if self.text else ()), *self.inputs]

    def record(self) -> dict[str, Any]:
        """Return what story.json keeps of the request."""
        options = recorded_options(self.model, self.options)
        return {"model": self.model.model, "seed": self.options.seed, "options": options, "title": self.title}


def recorded_options(model: ModelRequest, options: Options) -> dict[str, Any]:
    """Return the options that story.json keeps: those that are set, without the seed, and those of the engine."""
    values = {name: value for name, value in options.flat().items() if value is not None and name != "seed"}
    return values | model.given()


def tell_story(request: StoryRequest, model: InterleavedModel | None = None, tell: Tell = silent) -> Iterator[Event]:
    """Tell a story, or what is missing of it, or one scene of it anew; yields its events scene by scene.

    With `request.out`, the folder gets every image at once, story.json after every scene, and the page at the end. What
    was made is kept on an error or interruption too (but for a scene made anew, which then stays what it was); close
    the generator (`contextlib.closing`) to have that done. Raises Mgp5Error for an input that cannot be read, a wrong
    model or a folder that is taken, before anything is made.

    Args:
        model: an open model; None opens `request.model`.
        tell: is given lines for the user, see `open_model`, and at last where the story is.
    """
    from ..hub import resolve

    inputs = request.read_inputs(tell)
    if model is None:
        resolve(request.model.model)  # a wrong name is reported before a folder is made
    with ExitStack() as stack:
        folder = None
        if request.again:
            folder = StoryFolder.open(request.out, write=True)
        elif request.out:
            folder = StoryFolder.create(request.out, request.overwrite)
        if folder:
            stack.enter_context(closing(folder))
        if request.again:
            plan = _plan_again(request, take_up(folder, inputs, request.scenes, tell), tell)
        else:
            inputs += [SceneInput()] * (1 if request.scenes is None else request.scenes)
            plan = Plan(inputs, [], request.record(), range(len(inputs)))
        if plan.numbers and model is None:
            model = open_model(request.model, tell)
        if folder and request.overwrite:
            folder.clear(part.image for part in inputs if part.image)
        yield from _tell(plan, model, request.options, folder, tell)


@dataclass
class Plan:
    """The scenes of a story: what the user gave of all, those that are whole, and the numbers of those to make."""

    inputs: list[SceneInput]
    scenes: list[StoryScene]
    record: dict[str, Any]  # what story.json keeps of the request
    numbers: range
    anew: bool = False  # whether the one to make stands in the place of one that is whole
    partial: Sequence[Image] = ()  # images in the folder that were made of a scene that is not whole


def _plan_again(request: StoryRequest, earlier: Earlier, tell: Tell) -> Plan:
    """Return what is to make of a story that was begun. Raises Mgp5Error if that is another story, or nothing."""
    inputs, scenes, story = earlier.inputs, earlier.scenes, earlier.record
    record = json.loads(json.dumps(request.record()))
    compared = ("model", "seed", "options") if request.resume else ("model",)
    if changed := [name for name in compared if record[name] != story[name]]:
        found = f"the story in {request.out} was told with another {', '.join(changed)}"
        raise Mgp5Error(found, "go on with the same", usage=True)
    record = {name: story[name] for name in (*record, "anew") if name in story}
    record |= {"title": request.title} if request.title else {}
    if request.scene is None:
        if len(scenes) == len(inputs):
            tell("the story is whole: nothing was missing")
        return Plan(inputs, scenes, record, range(len(scenes), len(inputs)), partial=earlier.partial)
    if request.scene > len(scenes):
        raise Mgp5Error(f"--scene {request.scene}, but the story has {len(scenes)} whole scenes", usage=True)
    before = scenes[request.scene - 1]
    if before.kind == "given":
        raise Mgp5Error(f"image and text of scene {request.scene} are yours", "name one of the model's", usage=True)
    if before.kind != "narrated":
        tell(f"the image before is still in {before.image.path}")
    return Plan(inputs, scenes, record, range(request.scene - 1, request.scene), True, earlier.partial)


def _tell(
    plan: Plan, model: InterleavedModel | None, options: Options, folder: StoryFolder | None, tell: Tell
) -> Iterator[Event]:
    """Yield the events of the scenes to make, and keep the story in its folder."""
    numbers, after, complete = plan.numbers, plan.scenes[plan.numbers.stop :], False
    recorder, whole = Recorder(scenes=plan.scenes[: numbers.start]), len(plan.scenes)

    def save() -> None:
        given = [part.record(folder.path) for part in plan.inputs]
        folder.save(story_conversation([*recorder.scenes, *after]), **plan.record, given=given, whole=whole)

    if plan.partial:
        recorder.scenes, scenes = list(plan.scenes), recorder.scenes
        save()
        folder.remove(plan.partial)
        recorder.scenes = scenes
    try:
        events = _events(model, plan, options)
        with closing(keep_images(events, folder) if folder else events) as events:
            for event in events:
                recorder(event)
                whole += isinstance(event, Finished) and not plan.anew
                if isinstance(event, Finished) and (plan.anew or "anew" in plan.record):
                    number = len(recorder.scenes) - 1
                    order = plan.record.get("anew", [])  # in which scenes were made since the first was made anew
                    plan.record["anew"] = [*(other for other in order if other != number), number]
                if folder and isinstance(event, Finished) and recorder.generated:
                    save()
                yield event
        complete = True
    finally:
        if folder and (complete or (recorder.generated and not plan.anew)):
            save()
            write_html(*folder.load(), folder.path / "story.html")
            tell(f"The story is in {folder.path / 'story.html'}")


def _events(model: InterleavedModel | None, plan: Plan, options: Options) -> Iterator[Event]:
    """Yield the events of the scenes to make: for each SceneStart, what the user gave, then the model's reply."""
    from ..inference.reply import generate
    from ..inference.session import Session

    scenes = plan.scenes
    # One session for all scenes: images are encoded once. It reads each prompt anew, so that a scene does not depend
    # on the calls before.
    session, foreign = Session(model, reuse=False) if plan.numbers else None, False
    for number in plan.numbers:
        part = plan.inputs[number]
        yield SceneStart(number, part.kind, len(plan.inputs))
        images = (part.image,) if part.image and not foreign else ()  # one line on images is enough
        foreign = foreign or bool(remarks(model.config.world, "", images))
        yield from remarks(model.config.world, part.text, images)
        if part.image:
            yield ImageDone(0, part.image)
        if part.text:
            yield TextChunk(part.text)
        if asked := scene_request(scenes[:number], part, options, model.config.narrate_from):
            for event in generate(model, *asked, session):
                if isinstance(event, Finished):
                    scenes[number : number + 1] = [finished_scene(part, event.message)]
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
    `history` is text and image of the scenes before that have an image; the last WINDOW of them are shown."""
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

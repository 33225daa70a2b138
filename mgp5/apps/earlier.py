"""Take up a story again: what story.json tells of its scenes, and of the request that they were made by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from ..errors import Mgp5Error
from ..messages import Conversation, Image
from ..options import ModelRequest, Options, reply_options
from ..views.files import StoryFolder
from .inputs import SceneInput, read_image
from .open_model import Tell, image_options
from .recorder import GIVEN, StoryScene

ENGINE = ("backend", "exported", "quantize")  # options of a story.json that are those of the model


@dataclass
class Earlier:
    """A story in its folder."""

    inputs: list[SceneInput]  # what the user gave of all scenes
    scenes: list[StoryScene]  # those that are whole
    record: dict[str, Any]  # what story.json keeps of the request
    partial: list[Image]  # images in the folder that belong to no whole scene


def recorded_request(folder: Path) -> tuple[ModelRequest, Options]:
    """Return model and options of the story in a folder. Raises Mgp5Error if it holds none."""
    story = StoryFolder.open(folder).load()[1]
    options = dict(story["options"])
    engine = {name: options.pop(name) for name in ENGINE if name in options}
    model = ModelRequest(model=story["model"], **engine)
    if model.exported:
        model = replace(model, exported=Path(model.exported))
    seed = {} if story["seed"] is None else {"seed": story["seed"]}
    return model, reply_options(image_options(model), **seed, **options)


def take_up(folder: StoryFolder, given: Sequence[SceneInput], scenes: int | None, tell: Tell) -> Earlier:
    """Return the story of a folder.

    Args:
        given: images and texts as far as they are given again; otherwise they are read from where they were.
        scenes: that the model is to add in all; None: as many as before.
        tell: is given a line for an image that is gone.

    Raises:
        Mgp5Error: the folder holds no story of scenes, or `given` is something else than the scenes were made of.
    """
    conversation, story = folder.load()
    record, whole = story.get("given"), story.get("whole")
    kept = _whole_scenes(conversation, record[:whole]) if isinstance(record, list) and isinstance(whole, int) else None
    if kept is None or not all(scene.image for scene in kept):
        raise Mgp5Error(f"{folder.path} is no story that can be taken up", "choose another --out")
    own = next((number for number, part in enumerate(reversed(record)) if part), len(record))  # scenes without input
    again = [part.record(folder.path) for part in given] if given else record[: len(record) - own]
    again += [{}] * (own if scenes is None else scenes)
    if again[:whole] != record[:whole]:
        found = f"the {whole} scenes in {folder.path} are not those of these images and texts"
        raise Mgp5Error(found, "give the same, or none", usage=True)
    inputs, used = [], {scene.image.path for scene in kept}
    for number, part in enumerate(again):
        image = given[number].image if number < len(given) else None
        if "image" in part and not image:
            image = _image_again(folder, part["image"], kept[number].image if number < whole else None, tell)
        inputs.append(SceneInput(image, part.get("text", "")))
    for number, (part, scene) in enumerate(zip(inputs, kept, strict=False)):
        if part.image:  # prompts show it as it was given: a copy of a JPEG has other pixels
            folder.adopt(part.image, scene.image)
            kept[number] = replace(scene, image=part.image)
    return Earlier(inputs, kept, story, [image for image in conversation.images if image.path not in used])


def _whole_scenes(conversation: Conversation, record: Sequence[dict[str, str]]) -> list[StoryScene]:
    messages, scenes = iter(conversation.messages), []
    for part in record:
        kind = SceneInput(Image() if "image" in part else None, part.get("text", "")).kind
        own = Conversation(tuple(islice(messages, 2 if kind in GIVEN else 1)))
        text = " ".join(message.text for message in own.messages if message.text)
        scenes.append(StoryScene(kind, text, next(iter(own.images), None)))
    return scenes


def _image_again(folder: StoryFolder, name: str, copy: Image | None, tell: Tell) -> Image:
    """Return the image of a file, or its copy in the folder."""
    path = folder.path.resolve() / name
    if name and path.is_file():
        return read_image(path)
    if copy is None:
        raise Mgp5Error(f"{path if name else 'an image'} is not there any more", "put it back, or give --images again")
    if name:
        tell(f"{path} is not there any more: its copy in {folder.path} is shown to the model")
    return copy

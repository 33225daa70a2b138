"""Training conversations of Storyland made on the fly, as the loaders would yield them, with all that is known in them.

T tokens, V vocabulary.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

import numpy as np
from clip import SIZE, to_vision
from PIL import Image as pil
from torch import Tensor

from mgp5.backbones.hf import HFBackbone
from mgp5.data.cc3m import clean_caption
from mgp5.messages import Conversation, Image
from mgp5.prompts import (
    CAPTION_INSTRUCTIONS,
    CAPTION_SYSTEM,
    CHAT_SYSTEM,
    IGNORE,
    STORY_SYSTEM,
    TASK_PROMPTS,
    Context,
    Task,
    continue_,
    example,
    expand_labels,
    illustrate,
    narrate,
)
from mgp5.storyland.draw import draw
from mgp5.storyland.talk import Dialog, dialog
from mgp5.storyland.tell import Story, caption, story
from mgp5.storyland.world import Scene, Split, random_scene


@dataclass(frozen=True)
class Lesson:
    """A conversation whose last message is to be learned, and the scenes that its sentences tell."""

    conversation: Conversation
    told: tuple[Scene, ...] = ()  # known at the n-th full stop behind the system text
    about: Scene | None = None  # what the reply is about, where that is known before it begins


@dataclass(frozen=True)
class Sample:
    """A conversation as the heads need it."""

    ids: list[int]  # (T,) pictures expanded to their slots
    labels: list[int]  # (T,) token to be told at this place, V where a picture is due, IGNORE in pictures
    pictures: tuple[Image, ...]  # seen, in order
    states: tuple[tuple[int, Scene], ...]  # positions, and the scene that is known there
    reply: int  # where the reply begins: the position that predicts its first token
    target: Scene | None  # what the target's picture shows


def picture(scene: Scene, seed: int, words: str = "") -> Image:
    """A picture yet to be drawn."""
    return Image(caption=words, meta={"scene": scene.indices(), "seed": seed})


def story_lesson(told: Story, task: Task, step: int, choice: int, context: Context) -> Lesson:
    """What `mgp5.data.vist` yields for a step (from 0) of a story."""
    scenes = [(part.text, picture(part.scene, told.seed + k)) for k, part in enumerate(told.steps)]
    known = tuple(part.scene for part in told.steps[: 0 if context == "none" else step])
    *history, (text, image) = scenes[: step + 1]
    if task == "illustrate":
        asked = illustrate(history, text, choice, context=context)
        return Lesson(asked.add("assistant", image), (*known, told.steps[step].scene), told.steps[step].scene)
    if task == "continue":
        return Lesson(continue_(history, choice, context=context).add("assistant", text, image), known)
    asked = narrate(history, image, choice, context=context)
    return Lesson(asked.add("assistant", text), known, told.steps[step].scene)


def dialog_lesson(told: Dialog, target: int) -> Lesson:
    """What `mgp5.data.mmdialog` yields for a turn (from 0, odd) of a dialogue."""
    conversation = Conversation().add("system", CHAT_SYSTEM)
    for k, turn in enumerate(told.turns[: target + 1]):
        image = [picture(turn.scene, told.seed + k)] if turn.scene else []
        conversation = conversation.add(turn.role, turn.text, *image)
    shown = [turn.scene for turn in told.turns[: target + 1] if turn.scene]
    return Lesson(conversation, about=shown[-1] if shown else None)


def story_drawing_lesson(r: random.Random, split: Split) -> Lesson:
    """A request for a new character behind a story, as in `mgp5 chat --resume STORY`."""
    told, talk = story(r, split), dialog(r, split)
    while talk.turns[1].scene is None:
        talk = dialog(r, split)
    (text, image), *more = [(part.text, picture(part.scene, told.seed + k)) for k, part in enumerate(told.steps)]
    conversation = (
        Conversation().add("system", STORY_SYSTEM).add("user", text, image, r.choice(TASK_PROMPTS["continue"]))
    )
    for text, image in more[: r.randrange(1, 4)]:
        conversation = conversation.add("assistant", text, image).add("user", r.choice(TASK_PROMPTS["continue"]))
    asked, reply = talk.turns[:2]
    conversation = Conversation(conversation.messages[:-1]).add("user", asked.text)
    return Lesson(conversation.add("assistant", reply.text, picture(reply.scene, talk.seed)), about=reply.scene)


def caption_lesson(r: random.Random, split: Split) -> Lesson:
    """What `mgp5.data.cc3m` yields: a caption, at times as an instruction, and its picture."""
    scene = random_scene(r, split)
    words = clean_caption(caption(scene, r))
    asked = Conversation().add("user", words)
    if r.random() < 0.2:
        asked = Conversation().add("system", CAPTION_SYSTEM).add("user", f"{r.choice(CAPTION_INSTRUCTIONS)} {words}")
    return Lesson(asked.add("assistant", picture(scene, r.getrandbits(31), words)), about=scene)


def lesson(r: random.Random, split: Split) -> Lesson:
    """A random sample: 57% stories, many of them narrations, 3% drawings behind one, 30% dialogues, 10% captions."""
    kind = r.random()
    if kind < 0.03:
        return story_drawing_lesson(r, split)
    if kind < 0.6:
        task = r.choice((*TASK_PROMPTS, "narrate", "narrate"))
        step = r.choice((1, 2, 3, 4, 4) if task == "continue" else (0, 0, 1, 2, 3, 4))
        context = r.choice(("full",) * 7 + ("text",) * 2 + ("none",))
        return story_lesson(story(r, split), task, step, r.randrange(len(TASK_PROMPTS[task])), context)
    if kind < 0.9:
        told = dialog(r, split)
        return dialog_lesson(told, r.choice((len(told.turns) - 1, r.randrange(1, len(told.turns), 2))))
    return caption_lesson(r, split)


def sample(backbone: HFBackbone, lesson: Lesson) -> Sample:
    """Ids, labels and known scenes of a lesson; the target's picture is left out, its place is labelled V."""
    slots = backbone.core.config.image_seq_length
    due_image = ([backbone.image_token_id], [backbone.image_token_id])
    targets = lesson.conversation.messages[-1].images
    built = example(backbone, lesson.conversation, backbone.image_token, [due_image] * len(targets))
    if built.targets:  # there are no vokens yet: the reply ends where its picture is due
        built = replace(built, ids=built.ids[:-2] + built.ids[-1:], labels=built.labels[:-2] + built.labels[-1:])
    ids, _ = expand_labels(built, backbone.image_token_id, [slots] * len(built.images))
    labels = [IGNORE if token == backbone.image_token_id else token for token in ids]
    starts = [t for t, label in enumerate(labels) if label == IGNORE][::slots]
    roles = [message.role for message in lesson.conversation.messages[:-1] for _ in message.images]
    due, states = len(backbone.tokenizer), []
    for start, role, image in zip(starts, roles, built.images, strict=True):
        states.append((start + slots - 1, scene_of(image)))
        if role == "assistant":
            labels[start] = due
            states.append((start - 1, scene_of(image)))
    for image in built.targets:
        labels[-1] = due
        states.append((len(ids) - 2, scene_of(image)))
    stop = backbone.tokenizer.convert_tokens_to_ids(".")
    stops = [t for t, token in enumerate(ids) if token == stop][STORY_SYSTEM.count(".") :]
    states += zip(stops, lesson.told, strict=False)
    reply = len(ids) - sum(label != IGNORE for label in built.labels) - 1
    if lesson.about:  # every word of the reply is written with the scene in mind, or it is told by rote
        states += [(t, lesson.about) for t in range(reply, len(ids) - 1)]
    target = scene_of(built.targets[0]) if built.targets else None
    return Sample(ids, labels, built.images, tuple(states), reply, target)


def scene_of(image: Image) -> Scene:
    return Scene.from_indices(image.meta["scene"])


def pixels(images: list[Image]) -> Tensor:
    """Pictures drawn as the image processor would hand them on: (B, 3, 96, 96) in [-1, 1]."""
    drawn = [draw(scene_of(i), i.meta["seed"]).resize((SIZE, SIZE), pil.Resampling.BICUBIC) for i in images]
    return to_vision(np.stack([np.asarray(p) for p in drawn]))

"""Who replies: the model, and the baselines that the papers compare with, all as questions -> replies (B questions)."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import Mgp5Error
from ..events import Finished
from ..generators import load_generator
from ..generators.latent_diffusion import LatentDiffusion, no_text_encoder
from ..heads import DrawContext, Head, HeadSpec, ImageContext, Request, Response
from ..inference.reply import generate_batch
from ..inference.request import complete, to_image
from ..loading import load_backbone
from ..messages import Image, Message, Text
from ..model import InterleavedModel
from ..options import DiffusionOptions, ImageOptions, Options
from .storyland import Oracle, Reconstruction
from .tasks import Question, Sample

if TYPE_CHECKING:
    from ..backbones import Backbone
    from ..storyland.world import Scene

ONE_IMAGE = {"image": "always", "max_images": 1}
OPTIONS_OF: dict[str, dict[str, Any]] = {  # what replies to a kind of question hold; in a dialogue the model decides
    "caption": ONE_IMAGE | {"max_tokens": 0},
    "illustrate": ONE_IMAGE | {"max_tokens": 0},
    "details": ONE_IMAGE | {"max_tokens": 0},
    "continue": ONE_IMAGE,
    "story": ONE_IMAGE,
    "narrate": {"image": "never"},
    "dialogue": {},
}
NEEDS_PATH = {"t2i-tuned": "a diffusers folder", "gill": "a run of mgp5 train --preset gill"}
BOUNDS = ("oracle", "VAE", "VAE-anew")  # of Storyland
BASELINES = ("t2i", "t2i-tuned", "two-stage", "gill", "text-only")
System = Callable[[Sequence[Question]], list[Message]]


@dataclass(frozen=True)
class Entry:
    """A system that is to reply: "model" or a baseline, and the path of its own weights.

    One that is implied by the format of the data is left out where the model's head cannot do it.
    """

    name: str
    path: str = ""
    implied: bool = False

    def takes(self, sample: Sample) -> bool:
        """Return whether it can reply to a question."""
        drawn = ("caption", "illustrate", "details")
        if self.name in BOUNDS:
            return sample.kind == "illustrate" and sample.context == "full"
        if self.name in ("t2i", "t2i-tuned"):
            return sample.kind in drawn and sample.context != "image"
        if self.name == "two-stage":
            return sample.kind in (("continue", *drawn) if self.path else ("continue",))
        return self.name != "text-only" or sample.kind in ("narrate", "continue", "dialogue")


def entries(baselines: Sequence[str], format: str) -> list[Entry]:
    """Return the model, `NAME[=PATH]` baselines, and on Storyland what its own numbers are compared with.

    Raises Mgp5Error (wrong usage) if a name is unknown or a path is missing.
    """
    found = {"model": Entry("model")}
    if format == "storyland":
        found |= {name: Entry(name, implied=True) for name in ("two-stage", *BOUNDS)}
    for item in baselines:
        name, _, path = item.partition("=")
        if name not in BASELINES:
            raise Mgp5Error(f"no baseline {name!r}", f"choose of {', '.join(BASELINES)}", usage=True)
        if name in NEEDS_PATH and not path:
            raise Mgp5Error(f"--baseline {name} without a path", f"give {name}=PATH, {NEEDS_PATH[name]}", usage=True)
        found[name] = Entry(name, path)
    return list(found.values())


@dataclass(frozen=True)
class Model:
    """Reply by an interleaved model: the one that is evaluated, or one trained with GILL's objective."""

    model: InterleavedModel
    options: Options

    def __call__(self, questions: Sequence[Question], **overrides: Any) -> list[Message]:
        """Reply; `overrides` of options go before those of the kind of question."""
        options = [
            self.options.updated({"seed": q.seed, "image_seed": None} | OPTIONS_OF[q.sample.kind] | overrides)
            for q in questions
        ]
        events = generate_batch(self.model, [question.conversation for question in questions], options)
        replies = {index: event.message for index, event in events if isinstance(event, Finished)}
        return [replies[index] for index in range(len(questions))]


@dataclass(frozen=True)
class TextToImage:
    """Draw by a text-to-image model that reads the texts of the history, as many as fit, and what the image shows."""

    generator: LatentDiffusion
    options: Options

    def __call__(self, questions: Sequence[Question]) -> list[Message]:
        texts = [self._prompt(question.sample) for question in questions]
        return [Message("assistant", (image,)) for image in self.draw(texts, [q.seed for q in questions])]

    def _prompt(self, sample: Sample) -> str:
        """Return all that was told, without the oldest sentences where it is too long."""
        tokenizer, past = self.generator.tokenizer, list(sample.past)
        if tokenizer is None:
            raise no_text_encoder()
        while past and len(tokenizer(" ".join([*past, sample.words])).input_ids) > tokenizer.model_max_length:
            del past[0]
        return " ".join([*past, sample.words])

    @torch.inference_mode()
    def draw(self, texts: Sequence[str], seeds: Sequence[int]) -> list[Image]:
        """Draw an image of each text."""
        encoded = self.generator.encode_text([*texts, ""])  # (B + 1, L, D)
        conditions = encoded.to(self.generator.device, torch.float32)  # as the mapper's are
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        options = vars(DiffusionOptions.taking(**vars(self.options.image)))
        *_, latents = self.generator.draw(conditions[:-1], conditions[-1:], generators=generators, **options)
        metadata = [{"prompt": text, "seed": seed} for text, seed in zip(texts, seeds, strict=True)]
        return [to_image(*each) for each in zip(self.generator.decode(latents), metadata, strict=True)]


@dataclass(frozen=True)
class TwoStage:
    """Let an LLM write what the image shows, and a text-to-image model draw that (MiniGPT-5, section 4.2.1).

    An LLM of its own may be one that was trained to write captions. That of the model writes a story's next sentence,
    which is drawn as in the paper of 2023, and takes no other questions. A reply without text has no image.
    """

    writer: Model
    painter: TextToImage
    captions: bool

    def __call__(self, questions: Sequence[Question]) -> list[Message]:
        overrides = {"image": "never", "max_tokens": self.writer.options.max_tokens} if self.captions else {}
        replies = self.writer(questions, **overrides)
        texts = [next((part for part in reply.content if isinstance(part, Text)), Text("")) for reply in replies]
        prompts = [(text.text, q.seed) for text, q in zip(texts, questions, strict=True) if text.text]
        images = iter(self.painter.draw(*zip(*prompts, strict=True)) if prompts else ())
        parts = []
        for text, question in zip(texts, questions, strict=True):
            words = (text,) if question.sample.kind == "continue" else ()
            parts.append((*words, next(images)) if text.text else ())
        return [Message("assistant", content) for content in parts]


class NoHead(Head):
    """Stand for an image head beside an LLM that has none: its trigger must not be generated."""

    spec = HeadSpec(name="none", new_tokens=("[IMG0]",), positions=1, losses=(), image_options=ImageOptions)


class Undrawn(Head):
    """Stand for a model's head, which encodes the context images, and draw nothing: an image takes no time."""

    def __init__(self, head: Head) -> None:
        super().__init__()
        self.head, self.spec, self.ids = head, head.spec, head.ids

    def context_slots(self, backbone: Backbone, inputs: dict[str, Tensor]) -> list[int]:
        return self.head.context_slots(backbone, inputs)

    def encode_images(self, backbone: Backbone, inputs: dict[str, Tensor]) -> ImageContext:
        return self.head.encode_images(backbone, inputs)

    def draw(self, context: DrawContext) -> Generator[Request, Response, Tensor]:
        return torch.zeros(3, 8, 8)
        yield


def build(
    entry: Entry,
    model: InterleavedModel,
    options: Options,
    scenes: Mapping[Path, Scene],
    load: Callable[[str], InterleavedModel],
) -> System:
    """Build a system; what the options of its replies leave open becomes the model's own.

    The model is shared by all systems without weights of their own, `load` gives another by its name or folder. Raises
    Mgp5Error if weights cannot be loaded, or if the model's head has no text-to-image model.
    """
    name, path = entry.name, entry.path
    options = complete(model, options)
    if name in ("model", "gill"):
        return Model(load(path) if path else model, options)
    if name == "text-only":
        return partial(Model(_writer(path or model.config.mllm, model), options), image="never")
    generator = getattr(model.head, "generator", None)
    if not isinstance(generator, LatentDiffusion):
        raise Mgp5Error(f"the head {model.head.spec.name} draws by no text-to-image model", f"leave {name} out")
    if name == "t2i-tuned":
        return TextToImage(load_generator(path, generator.denoiser.dtype).to(generator.device), options)
    painter = TextToImage(generator, options)
    if name == "two-stage":
        undrawn = SimpleNamespace(backbone=model.backbone, head=Undrawn(model.head), config=model.config)
        return TwoStage(Model(_writer(path, model) if path else undrawn, options), painter, captions=bool(path))
    return {
        "t2i": painter,
        "oracle": Oracle(painter.draw, scenes),
        "VAE": Reconstruction(generator),
        "VAE-anew": Reconstruction(generator, scenes),
    }[name]


def _writer(path: str, model: InterleavedModel) -> InterleavedModel:
    """Return the LLM of a folder or the hub as a model without images."""
    backbone = load_backbone(path, model.backbone.lm_head.weight.dtype).to(model.device)
    return InterleavedModel(backbone, NoHead(), replace(model.config, mllm=path))

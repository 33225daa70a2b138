"""Who replies: the model, and the baselines that the papers compare with, all as conversations -> replies.

B questions, L and C of a condition.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ..errors import Mgp5Error
from ..events import Finished
from ..generators import load_generator
from ..generators.latent_diffusion import LatentDiffusion, no_text_encoder
from ..heads import DrawContext, Forced, Request, Response
from ..heads.minigpt5 import to_pixels
from ..inference.reply import generate_batch
from ..inference.request import complete, to_picture
from ..loading import assemble, load_backbone
from ..messages import Conversation, Image, Message, Text
from ..model import InterleavedModel
from ..options import Options
from ..storyland.draw import draw
from ..storyland.tell import caption
from ..storyland.world import Scene, rng
from .tasks import Sample

ONE_PICTURE = {"image": "always", "max_images": 1}
ASKED: dict[str, dict[str, Any]] = {  # what replies hold; in a dialogue the model decides
    "caption": ONE_PICTURE | {"max_tokens": 0},
    "illustrate": ONE_PICTURE | {"max_tokens": 0},
    "continue": ONE_PICTURE,
    "story": ONE_PICTURE,
    "narrate": {"image": "never"},
    "dialogue": {},
}


@dataclass(frozen=True)
class Ask:
    """A question, the sample it belongs to, the true reply (for bounds only), and the seed of the reply."""

    sample: Sample
    question: Conversation
    truth: Message
    seed: int


System = Callable[[Sequence[Ask]], list[Message]]


@dataclass(frozen=True)
class Model:
    """MiniGPT-5, or a model trained with GILL's objective (`mgp5 train --preset gill`): an ordinary model here."""

    model: InterleavedModel
    options: Options

    def __call__(self, asks: Sequence[Ask], **own: Any) -> list[Message]:
        """Replies; `own` options go before those of the kind."""
        each = [
            self.options.updated({"seed": ask.seed, "image_seed": None} | ASKED[ask.sample.kind] | own) for ask in asks
        ]
        replies: dict[int, Message] = {}
        for index, event in generate_batch(self.model, [ask.question for ask in asks], each):
            if isinstance(event, Finished):
                replies[index] = event.message
        return [replies[index] for index in range(len(asks))]


@dataclass(frozen=True)
class TextOnly:
    """An LLM without vokens, for the metrics of text."""

    writer: Model

    def __call__(self, asks: Sequence[Ask]) -> list[Message]:
        return self.writer(asks, image="never")


@dataclass(frozen=True)
class TextToImage:
    """A text-to-image model alone: it reads the texts of the history, as far as its tokens go, and of what is due."""

    diffusion: LatentDiffusion
    options: Options

    def __call__(self, asks: Sequence[Ask]) -> list[Message]:
        texts = [self._prompt(ask.sample) for ask in asks]
        return [Message("assistant", (image,)) for image in self.draw(texts, [ask.seed for ask in asks])]

    def _prompt(self, sample: Sample) -> str:
        """All that was told, without the oldest sentences where it is too long: the scene itself comes last."""
        tokenizer, past = self.diffusion.tokenizer, list(sample.past)
        if tokenizer is None:
            raise no_text_encoder()
        while past and len(tokenizer(" ".join([*past, sample.words])).input_ids) > tokenizer.model_max_length:
            del past[0]
        return " ".join([*past, sample.words])

    @torch.inference_mode()
    def draw(self, texts: Sequence[str], seeds: Sequence[int]) -> list[Image]:
        """A picture of each text."""
        encoded = self.diffusion.encode_text([*texts, ""])  # (B + 1, L, C)
        conditions = encoded.to(self.diffusion.device, torch.float32)  # as the mapper's are
        names = ("steps", "guidance", "sampler", "height", "width", "guidance_until", "reuse")
        *_, latents = self.diffusion.draw(
            conditions[:-1],
            conditions[-1:],
            generators=[torch.Generator().manual_seed(seed) for seed in seeds],
            **{name: getattr(self.options.image, name) for name in names},
        )
        facts = [{"prompt": text, "seed": seed} for text, seed in zip(texts, seeds, strict=True)]
        pictures = map(to_picture, self.diffusion.decode(latents))
        return [Image(pixels=pixels, meta=meta) for pixels, meta in zip(pictures, facts, strict=True)]


@dataclass(frozen=True)
class TwoStage:
    """The LLM writes what the picture shows, and text-to-image draws that (MiniGPT-5, section 4.2.1).

    An LLM of its own may be one that was trained to write captions. That of the model writes a story's next sentence,
    which is drawn as in the paper of 2023, and takes no other questions. A reply without words has no picture.
    """

    writer: Model
    painter: TextToImage
    captions: bool

    def __call__(self, asks: Sequence[Ask]) -> list[Message]:
        own = {"image": "never", "max_tokens": self.writer.options.max_tokens} if self.captions else {}
        replies = self.writer(asks, **own)
        texts = [next((part.text for part in reply.content if isinstance(part, Text)), "") for reply in replies]
        told = [(text, ask.seed) for text, ask in zip(texts, asks, strict=True) if text]
        pictures = iter(self.painter.draw(*zip(*told, strict=True))) if told else iter(())
        parts = []
        for text, ask in zip(texts, asks, strict=True):
            words = (Text(text),) if text and ask.sample.kind == "continue" else ()
            parts.append((*words, next(pictures)) if text else ())
        return [Message("assistant", content) for content in parts]


class Undrawn:
    """A model's head that draws nothing: its LLM writes as ever, and what it would draw takes no time."""

    def __init__(self, head: Any) -> None:
        self._head = head

    def __getattr__(self, name: str) -> Any:
        return getattr(self._head, name)

    def check(self, options: Any) -> None:
        """Accept any options: they are not used."""

    def draw(self, context: DrawContext) -> Generator[Request, Response, Tensor]:
        """Read the tokens of an image, and draw nothing."""
        yield Forced(self._head.ids)
        return torch.zeros(3, 8, 8)


@dataclass(frozen=True)
class Oracle:
    """Storyland's upper bound: text-to-image that is told everything that the true picture shows."""

    painter: TextToImage
    scenes: Mapping[Path, Scene]

    def __call__(self, asks: Sequence[Ask]) -> list[Message]:
        shown = [self.scenes[ask.truth.images[0].path.resolve()] for ask in asks]
        texts = [caption(scene, rng("test", ask.seed, 0)) for scene, ask in zip(shown, asks, strict=True)]
        return [Message("assistant", (image,)) for image in self.painter.draw(texts, [ask.seed for ask in asks])]


@dataclass(frozen=True)
class Reconstruction:
    """What the VAE makes of a true picture: no picture that is drawn from latents can be nearer to it.

    With scenes it is given other renders of what true pictures show, as generated pictures are others too: a Frechet
    distance of a few pictures is far smaller between pairs.
    """

    diffusion: LatentDiffusion
    scenes: Mapping[Path, Scene] | None = None

    @torch.inference_mode()
    def __call__(self, asks: Sequence[Ask]) -> list[Message]:
        side, true = self.diffusion.native_size, [ask.truth.images[0] for ask in asks]
        if self.scenes is None:
            pictures = [image.load() for image in true]
        else:
            pictures = [draw(self.scenes[i.path.resolve()], ask.seed) for i, ask in zip(true, asks, strict=True)]
        pixels = torch.stack([to_pixels(picture, (side, side)) for picture in pictures])  # (B, 3, H, W)
        again = self.diffusion.decode(self.diffusion.encode(pixels))
        return [Message("assistant", (Image(pixels=to_picture(one)),)) for one in again]


NEEDS_PATH = {"t2i-tuned": "a diffusers folder", "gill": "a run of mgp5 train --preset gill"}
BOUNDS = ("oracle", "VAE", "VAE-anew")  # of Storyland
BASELINES = ("t2i", "t2i-tuned", "two-stage", "gill", "text-only")


@dataclass(frozen=True)
class Entry:
    """A system that is to reply: its name, and the path of its own weights or ""."""

    name: str
    path: str = ""

    def takes(self, sample: Sample) -> bool:
        """Whether it can reply to a question."""
        drawn = ("caption", "illustrate")
        if self.name in BOUNDS:
            return sample.kind == "illustrate" and sample.context == "full"
        if self.name in ("t2i", "t2i-tuned"):
            return sample.kind in drawn and sample.context != "image"
        if self.name == "two-stage":
            return sample.kind in (("continue", *drawn) if self.path else ("continue",))
        return self.name != "text-only" or sample.kind in ("narrate", "continue", "dialogue")


def entries(baselines: Sequence[str], format: str) -> list[Entry]:
    """The model, `NAME[=PATH]` baselines, and on Storyland what its own numbers are compared with.

    Raises Mgp5Error (wrong usage) for an unknown name, or a path that is missing.
    """
    found = {"model": Entry("model")}
    if format == "storyland":
        found |= {name: Entry(name) for name in ("two-stage", *BOUNDS)}
    for item in baselines:
        name, _, path = item.partition("=")
        if name not in BASELINES:
            raise Mgp5Error(f"no baseline {name!r}", f"choose of {', '.join(BASELINES)}", usage=True)
        if name in NEEDS_PATH and not path:
            raise Mgp5Error(f"--baseline {name} without a path", f"give {name}=PATH, {NEEDS_PATH[name]}", usage=True)
        found[name] = Entry(name, path)
    return list(found.values())


def build(
    entry: Entry,
    model: InterleavedModel,
    options: Options,
    scenes: Mapping[Path, Scene],
    load: Callable[..., InterleavedModel],
) -> System:
    """A system.

    Args:
        model: shared by all that have no weights of their own.
        options: of its replies; guidance and temperature that are None become the model's.
        scenes: of Storyland, what pictures show.
        load: gives another model by its name or folder.
    """
    name, path = entry.name, entry.path
    options = complete(model, options)
    painter = TextToImage(model.head.generator, options)
    if name == "t2i-tuned":
        tuned = load_generator(path, model.head.generator.denoiser.dtype)
        return TextToImage(tuned.to(model.head.generator.device), options)
    shared: dict[str, System] = {
        "t2i": painter,
        "oracle": Oracle(painter, scenes),
        "VAE": Reconstruction(model.head.generator),
        "VAE-anew": Reconstruction(model.head.generator, scenes),
    }
    if name in shared:
        return shared[name]
    if name in ("model", "gill"):
        return Model(load(path) if path else model, options)
    if name == "text-only":
        return TextOnly(Model(_writer(path or model.config.mllm, model), options))
    undrawn = SimpleNamespace(backbone=model.backbone, head=Undrawn(model.head), config=model.config)
    return TwoStage(Model(_writer(path, model) if path else undrawn, options), painter, captions=bool(path))


def _writer(path: str, model: InterleavedModel) -> InterleavedModel:
    """The LLM of a folder or the hub beside a fresh mapper: a model whose vokens must not be said."""
    backbone = load_backbone(path, model.backbone.lm_head.weight.dtype).to(model.device)
    vokens = model.config.head_config.num_vokens
    writer = assemble(backbone, model.head.generator, path, model.config.diffusion, num_vokens=vokens)
    writer.head.mapper.to(model.device)
    return writer

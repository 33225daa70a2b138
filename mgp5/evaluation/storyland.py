"""What evaluations know of Storyland: its metrics, baselines that need its truth, and its data (B replies)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..files import replacing
from ..heads.minigpt5 import to_pixels
from ..inference.request import to_image
from ..messages import Image, Message, Text
from ..storyland import metrics
from ..storyland.details import kept, read_detail
from ..storyland.draw import draw
from ..storyland.language import mentions
from ..storyland.tell import caption
from ..storyland.world import ATTRIBUTES, Scene, held_out, rng
from ..storyland.write import write
from .metrics import frechet_distance
from .replies import Metric, Number, Replies, mean
from .tasks import EXTRA, Question

if TYPE_CHECKING:
    from ..generators.latent_diffusion import LatentDiffusion
    from .encoders import Encoders


def write_data(folder: Path, split: str, count: int, seed: int, tasks: Sequence[str]) -> None:
    """Write `count` stories and dialogues into a folder, or what tasks need, whole or not at all, unless it is
    there."""
    told, details = (count if wanted else 0 for wanted in ({*tasks} != {EXTRA}, EXTRA in tasks))
    if not folder.exists():
        with replacing(folder) as part:
            write(part, "train" if split == "train" else "test", 0, told, told, seed, details=details)


@dataclass(frozen=True)
class Oracle:
    """Draw as a text-to-image model that is told everything that the true image shows: an upper bound."""

    draw: Callable[[Sequence[str], Sequence[int]], list[Image]]  # of texts and seeds
    scenes: Mapping[Path, Scene]

    def __call__(self, questions: Sequence[Question]) -> list[Message]:
        shown = [self.scenes[question.truth.images[0].path.resolve()] for question in questions]
        texts = [caption(scene, rng("test", q.seed, 0)) for scene, q in zip(shown, questions, strict=True)]
        return [Message("assistant", (image,)) for image in self.draw(texts, [q.seed for q in questions])]


@dataclass(frozen=True)
class Reconstruction:
    """Reconstruct true images by the VAE: no image that is drawn from latents can be nearer to them.

    With scenes it is given other renders of what true images show, as generated images are others too: a Frechet
    distance of a few images is far smaller between pairs.
    """

    generator: LatentDiffusion
    scenes: Mapping[Path, Scene] | None = None

    @torch.inference_mode()
    def __call__(self, questions: Sequence[Question]) -> list[Message]:
        pictures = []
        for question in questions:
            image = question.truth.images[0]
            pictures.append(draw(self.scenes[image.path.resolve()], question.seed) if self.scenes else image.load())
        size = (self.generator.native_size,) * 2
        pixels = torch.stack([to_pixels(picture, size) for picture in pictures])  # (B, 3, H, W)
        again = self.generator.decode(self.generator.encode(pixels))
        return [Message("assistant", (to_image(image),)) for image in again]


def _attributes(replies: Replies, encoders: Encoders, generator: torch.Generator) -> Number:
    generated, real, samples = replies.images
    shown = [encoders.scene(image) for image in real]
    hits = metrics.attributes_right(encoders.judge(generated)[0], shown).float()  # (B, 7)
    due = torch.tensor([[name not in sample.open for name in ATTRIBUTES] for sample in samples])
    unsaid = due & torch.tensor([[name not in mentions(sample.words) for name in ATTRIBUTES] for sample in samples])
    new = torch.tensor([held_out(scene) for scene in shown])
    each = (hits * due).sum(1) / due.sum(1)  # (B,)
    shares = {"all seven": (each == 1).float(), "not in the sentence": hits[unsaid], "held out": each[new]}
    shares |= {name: hits[due[:, i], i] for i, name in enumerate(ATTRIBUTES)}
    detail = {name: values.mean().item() if len(values) else None for name, values in shares.items()}
    return mean(each, [sample.group for sample in samples], generator, **detail)


def _frechet(replies: Replies, encoders: Encoders, generator: torch.Generator) -> Number:
    generated, real, _ = replies.images
    return Number(frechet_distance(encoders.judge(generated)[1], encoders.judge(real)[1]), len(generated))


def _details(replies: Replies, encoders: Encoders, generator: torch.Generator) -> Number:
    """Measure what drawn images keep of the kite that the true ones show."""
    generated, real, samples = replies.images
    pairs = zip(generated, real, strict=True)
    rows = [kept(image.load(), read_detail(true.load())) for image, true in pairs]
    hits = torch.tensor([list(row.values()) for row in rows]).float()  # (B, 4)
    shares = dict(zip(rows[0], hits.mean(0).tolist(), strict=True)) | {"all four": hits.prod(1).mean().item()}
    return mean(hits.mean(1), [sample.group for sample in samples], generator, **shares)


def _before(replies: Replies, encoders: Encoders) -> list[Scene]:
    return [encoders.scene(sample.before) for sample, _, _ in replies.rows]


def _coherence(replies: Replies, encoders: Encoders, generator: torch.Generator) -> Number:
    read, _ = encoders.judge([reply.images[0] if reply.images else None for _, _, reply in replies.rows])
    texts = [reply.text for _, _, reply in replies.rows]
    hits = metrics.coherence(read, texts, _before(replies, encoders)).float()  # (B, 7)
    return mean(hits.mean(1), replies.groups, generator, **{"all seven": hits.prod(1).mean().item()})


def _narrations(replies: Replies, encoders: Encoders, generator: torch.Generator) -> Number:
    texts = [reply.text for _, _, reply in replies.rows]
    shown = [encoders.scene(sample.load().images[-1]) for sample, _, _ in replies.rows]
    hits = metrics.narration_right(texts, _before(replies, encoders), shown)
    return mean(hits, replies.groups, generator)


def _grammar(replies: Replies, encoders: Encoders, generator: torch.Generator) -> Number:
    """Measure whole stories; one that ended early lacks sentences: "" stands for them, which no grammar accepts."""
    stories = []
    for sample, _, reply in replies.rows:
        texts = [part.text for part in reply.content if isinstance(part, Text)]
        stories.append(texts + [""] * (sample.rounds - len(texts)))
    return mean(metrics.grammatical(stories), replies.groups, generator)


def _identity(replies: Replies, encoders: Encoders, generator: torch.Generator) -> Number:
    """Measure all images of a story; the first, which was given, is read too."""

    def kept(first: Image, images: Sequence[Image], rounds: int) -> Tensor:
        drawn = [first, *images]
        read, _ = encoders.judge(drawn + [None] * (1 + rounds - len(drawn)))
        return metrics.identity_kept(read[None], [encoders.scene(first)])

    rows = [kept(sample.opening[1], reply.images, sample.rounds) for sample, _, reply in replies.rows]
    return mean(torch.cat(rows), replies.groups, generator)


_SHARE, _OURS = "rows, true or false", "ours, Storyland"
METRICS: dict[str, Metric] = {
    "details": Metric(_details, (), _SHARE, _OURS),
    "attributes": Metric(_attributes, (), _SHARE, _OURS),
    "Frechet distance, judge": Metric(_frechet, (), "number, >= 0", _OURS, "lower"),
    "coherence": Metric(_coherence, (), _SHARE, _OURS),
    "narrations": Metric(_narrations, (), _SHARE, _OURS),
    "grammar": Metric(_grammar, (), _SHARE, _OURS),
    "identity": Metric(_identity, (), _SHARE, _OURS),
}

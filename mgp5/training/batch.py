"""Examples -> a batch of tensors. B samples, T tokens, K pictures to be seen, P pictures to be drawn."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING

import torch
from jinja2 import TemplateError
from PIL import Image as pil
from PIL import ImageOps
from torch import Tensor

from ..data.files import Skipped
from ..errors import Mgp5Error
from ..messages import Conversation, Image
from ..prompts import IGNORE, Example, VokenLabels, example, expand_labels, history_truncations

if TYPE_CHECKING:
    from ..backbones import Backbone
    from .feature_cache import Caches, Item


@dataclass(frozen=True)
class Batch:
    """Right-padded samples.

    Attributes:
        ids: (B, T) int64.
        mask: (B, T) int64, 1 on tokens, 0 on padding.
        labels: (B, T) int64, IGNORE where there is no loss; not shifted.
        seen: preprocessed pictures of all samples in reading order, as the backbone's `preprocess` returns them;
            empty when there are none.
        rows, starts: (P,) where each run of vokens begins: its sample and the position of its first voken.
        pixels: (P, 3, H, W) in [-1, 1], the pictures to be drawn; None when there are none, or `moments` hold them.
        captions: P descriptions, "" where there is none.
        features: of the pictures that are seen, (S, D) each, where a cache had them; `seen` then holds only grids.
        moments: (P, 2C, h, w) of the pictures to be drawn, from a cache.
        encodings: (P, L, C) of the captions, from a cache.
        skipped: what was left out, each as (kind of problem, where and why): samples, but of kind "history cut" only
            the beginning of one.
    """

    ids: Tensor
    mask: Tensor
    labels: Tensor
    seen: dict[str, Tensor]
    rows: tuple[int, ...]
    starts: tuple[int, ...]
    pixels: Tensor | None
    captions: tuple[str, ...]
    features: tuple[Tensor, ...] = ()
    moments: Tensor | None = None
    encodings: Tensor | None = None
    skipped: tuple[Skipped, ...] = ()

    @property
    def drawn(self) -> int:
        """P, how many pictures are to be drawn."""
        return len(self.starts)

    def to(self, device: torch.device) -> Batch:
        """The same batch on a device."""
        moved = {f.name: v.to(device) for f in fields(self) if isinstance(v := getattr(self, f.name), Tensor)}
        seen = {key: value.to(device) for key, value in self.seen.items()}
        return replace(self, **moved, seen=seen, features=tuple(value.to(device) for value in self.features))


class _Unusable(Exception):
    """A sample that has to be left out, and why."""

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.kind = kind


@dataclass(frozen=True)
class _Row:
    """A sample on its own."""

    ids: list[int]  # (T,)
    labels: list[int]  # (T,)
    inputs: list[dict[str, Tensor]]  # of each picture to be seen; from a cache "features" for "pixel_values"
    drawn: list[Tensor]  # (3, H, W) of each picture to be drawn; from a cache (2C, h, w)
    captions: list[str]
    cut: str  # why history was cut, "" if it was not


class Collator:
    """Turns conversations into a Batch; runs in data workers, holds no weights.

    A sample that cannot be used is left out and listed in `Batch.skipped`; none is ever replaced by another.

    Args:
        backbone: for its tokenizer, template and preprocessing.
        vokens: the voken tokens, e.g. "[IMG0]".
        size: (H, W) pixels of pictures to be drawn.
        max_length: tokens of a sample; of longer ones, history is cut from the left (see `prompt.shorter`).
        voken_labels: which vokens the text loss is over, see `prompt.example`.
        caches: what need not be computed. A batch takes of a kind what it needs from them, or, when they miss
            anything of it, nothing.
    """

    def __init__(
        self,
        backbone: Backbone,
        vokens: Sequence[str],
        size: tuple[int, int],
        max_length: int,
        voken_labels: VokenLabels = "all",
        caches: Caches | None = None,
    ) -> None:
        self.backbone = backbone
        self.vokens = tuple(vokens)
        self.size = size
        self.max_length = max_length
        self.voken_labels = voken_labels
        self.caches = caches
        self.trigger = backbone.tokenizer.convert_tokens_to_ids(self.vokens[0])

    def __call__(self, samples: Sequence[tuple[str, Conversation] | Conversation | Skipped]) -> Batch:
        """A batch of what can be used, in order; conversations come with their keys, which `skipped` then names."""
        rows, skipped = [], []
        usable = [sample for sample in samples if not isinstance(sample, Skipped)]
        latents, features = self._cached([s if isinstance(s, Conversation) else s[1] for s in usable])
        for sample in samples:
            if isinstance(sample, Skipped):
                skipped.append(sample)
                continue
            key, conversation = ("", sample) if isinstance(sample, Conversation) else sample
            try:
                row = self._row(conversation, latents, features)
            except _Unusable as reason:
                skipped.append(Skipped(reason.kind, f"{key} ({reason})"))
                continue
            rows.append(row)
            skipped += [Skipped("history cut", f"{key} ({row.cut})")] if row.cut else []
        return self._batch(rows, bool(latents), tuple(skipped))

    def _cached(self, conversations: Sequence[Conversation]) -> tuple[dict[int, Item], dict[int, Item]]:
        """Latents of the pictures to be drawn and features of those to be seen, by their `id()`; {} of what misses."""
        if self.caches is None:
            return {}, {}
        drawn = [image for conversation in conversations for image in conversation.messages[-1].images]
        seen = [image for c in conversations for message in c.messages[:-1] for image in message.images]
        return self.caches.pictures("latents", drawn), self.caches.pictures("features", seen)

    def _row(self, conversation: Conversation, latents: dict[int, Item], features: dict[int, Item]) -> _Row:
        """A sample as tensors. Raises _Unusable."""
        *context, target = conversation.messages
        seen = [image for message in context for image in message.images]
        if features:
            found = [features[id(image)] for image in seen]
            inputs = [{"features": value} | {k: v[None] for k, v in others.items()} for value, others in found]
        else:
            inputs = [self._see(image) for image in seen]
        drawn = [latents[id(image)][0] if latents else self._draw(image) for image in target.images]
        slots = [len(each["features"]) if features else self.backbone.slots(each)[0] for each in inputs]
        captions = [image.caption for image in target.images]
        try:
            "".join([*captions, *(message.text for message in conversation.messages)]).encode()  # no half characters
            sample, cut = self._fit(conversation, slots)
        except (TemplateError, UnicodeError) as error:
            raise _Unusable("unfit text", str(error)) from None
        first = len(inputs) - len(sample.images)  # pictures are cut from the left too
        ids, labels = expand_labels(sample, self.backbone.image_token_id, slots[first:])
        return _Row(ids, labels, inputs[first:], drawn, captions, cut)

    def _fit(self, conversation: Conversation, slots: list[int]) -> tuple[Example, str]:
        """The sample, with as little of its history cut as possible, and why if any was. Raises _Unusable."""

        def build(conversation: Conversation) -> Example:
            return example(self.backbone, conversation, self.vokens, self.voken_labels)

        def length(sample: Example) -> int:
            images = len(sample.images)
            return len(sample.ids) - images + sum(slots[len(slots) - images :])

        sample = build(conversation)
        if (whole := length(sample)) <= self.max_length:
            return sample, ""
        reason = f"{whole} tokens, {self.max_length} fit"
        cuts = history_truncations(conversation)
        least = bisect_left(cuts, True, key=lambda cut: length(build(cut)) <= self.max_length)
        if least == len(cuts):
            raise _Unusable("too long", reason)
        return build(cuts[least]), reason

    def _see(self, image: Image) -> dict[str, Tensor]:
        """A picture to be seen, as the backbone's `preprocess` returns it. Raises _Unusable."""
        try:
            return self.backbone.preprocess([image.load()])
        except (Mgp5Error, ValueError) as error:  # processors refuse extreme shapes
            raise _Unusable("broken image", str(error)) from None

    def _draw(self, image: Image) -> Tensor:  # (3, H, W)
        """A picture to be drawn. Raises _Unusable."""
        try:
            return to_pixels(image.load(), self.size)
        except Mgp5Error as error:
            raise _Unusable("broken image", str(error)) from None

    def _batch(self, rows: list[_Row], cached: bool, skipped: tuple[Skipped, ...]) -> Batch:
        seen = [inputs for row in rows for inputs in row.inputs]
        features = tuple(inputs.pop("features") for inputs in seen if "features" in inputs)
        drawn = torch.stack(d) if (d := [picture for row in rows for picture in row.drawn]) else None
        captions = tuple(caption for row in rows for caption in row.captions)
        # A run is one target; context never holds vokens, since their spelling is removed from what users write.
        runs = [(i, at) for i, row in enumerate(rows) for at, token in enumerate(row.ids) if token == self.trigger]
        return Batch(
            ids=_pad([row.ids for row in rows], self.backbone.tokenizer.pad_token_id or 0),
            mask=_pad([[1] * len(row.ids) for row in rows], 0),
            labels=_pad([row.labels for row in rows], IGNORE),
            seen={key: torch.cat([inputs[key] for inputs in seen]) for key in (seen[0] if seen else {})},
            rows=tuple(i for i, _ in runs),
            starts=tuple(at for _, at in runs),
            pixels=None if cached else drawn,
            captions=captions,
            features=features,
            moments=drawn if cached else None,
            encodings=self.caches.encodings(captions) if self.caches else None,
            skipped=skipped,
        )


def to_pixels(picture: pil.Image, size: tuple[int, int]) -> Tensor:
    """PIL RGB -> (3, H, W) in [-1, 1]: the largest centred part of that shape, resized; never padded, never flipped."""
    height, width = size
    picture = ImageOps.fit(picture, (width, height), pil.Resampling.LANCZOS)
    data = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
    return data.view(height, width, 3).permute(2, 0, 1).float() / 127.5 - 1


def _pad(rows: Sequence[Sequence[int]], value: int) -> Tensor:  # (B, T)
    length = max(map(len, rows), default=0)
    padded = [[*row, *[value] * (length - len(row))] for row in rows]
    return torch.tensor(padded, dtype=torch.int64).view(len(rows), length)

"""The collator, which turns training samples into a batch of tensors.

Letters: B batch, T tokens, N context images, P target images, S slots of one image.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

import torch
from jinja2 import TemplateError
from torch import Tensor

from ..config import TrainConfig
from ..errors import Mgp5Error
from ..heads.batch import Batch
from ..messages import Conversation, Image, Skipped
from ..prompts import IGNORE, Example, example, expand_labels, history_truncations, with_system

if TYPE_CHECKING:
    from PIL import Image as pil

    from ..backbones import Backbone
    from ..heads import Head
    from .feature_cache import Caches, Item


PARTS = 8  # of the LLM's width
LEAST = 1024  # pixels of a side to which a large JPEG is decoded: as many as any part takes


class _Unusable(Exception):
    """Why a sample is left out: `args` are the kind of problem and the reason."""


@dataclass(frozen=True)
class Encoded:
    """One sample of T tokens, N context images and P target images, before padding."""

    ids: list[int]  # (T,)
    labels: list[int]  # (T,)
    starts: list[int]  # (P,), positions of triggers
    inputs: list[dict[str, Tensor]]  # N, preprocessed; from a cache with "features" instead of "pixel_values"
    targets: list[dict[str, Tensor]]  # P, see `Head.target`
    captions: list[str]  # P
    truncated: str  # why history was removed, "" if it was not


class Collator:
    """Turn conversations into a Batch; runs in data workers, which share the model's memory and use no weights.

    A sample that cannot be used is left out and named in `Batch.skipped`, not replaced by another; one of more than
    `max_length` tokens loses history from the left. What the caches have for the whole batch is not computed.
    Conversations without a system message begin with `system`, if there is any. By `DataConfig.pack` rows of the batch
    hold several samples.
    """

    def __init__(
        self,
        backbone: Backbone,
        head: Head,
        max_length: int,
        config: TrainConfig | None = None,
        caches: Caches | None = None,
        system: str = "",
    ) -> None:
        self.backbone, self.head, self.max_length = backbone, head, max_length
        self.config, self.caches, self.system = config, caches, system

    def __call__(self, samples: Sequence[tuple[str, Conversation] | Conversation | Skipped]) -> Batch:
        """Return a batch of the usable samples, in order; `skipped` names the others by their keys."""
        rows, skipped = [], []
        keyed = [("", sample) if isinstance(sample, Conversation) else sample for sample in samples]
        cached = self._cached([sample[1] for sample in keyed if not isinstance(sample, Skipped)])
        for sample in keyed:
            if isinstance(sample, Skipped):
                skipped.append(sample)
                continue
            key, conversation = sample
            try:
                arranged = self.head.arrange(conversation, self.config) if self.config else conversation
                row = self._row(with_system(arranged, self.system), *cached)
            except _Unusable as error:
                kind, reason = error.args
                skipped.append(Skipped(kind, f"{key} ({reason})"))
                continue
            except Exception as error:  # whatever a row holds may not end a run of days: it costs that row
                skipped.append(Skipped("unfit sample", f"{key} ({type(error).__name__}: {error})"))
                continue
            rows.append(row)
            skipped += [Skipped("history cut", f"{key} ({row.truncated})")] if row.truncated else []
        return self.batch(rows, tuple(skipped))

    def _cached(self, conversations: Sequence[Conversation]) -> tuple[dict[int, Item], dict[int, Item]]:
        """Return stored target and context images by `id(image)`, {} if one misses, or where the stage needs pixels."""
        if self.caches is None or (self.config and not self.head.stage(self.config.stage).cached):
            return {}, {}
        targets = [image for conversation in conversations for image in conversation.messages[-1].images]
        context = [image for c in conversations for message in c.messages[:-1] for image in message.images]
        return self.caches.targets(targets), self.caches.context(context)

    def _row(self, conversation: Conversation, stored: dict[int, Item], features: dict[int, Item]) -> Encoded:
        """Convert a sample to tensors. Raises _Unusable."""
        *context, target = conversation.messages
        images = [image for message in context for image in message.images]
        if features:
            cached = [features[id(image)] for image in images]
            inputs = [{"features": value[None]} | {k: v[None] for k, v in others.items()} for value, others in cached]
        else:
            inputs = [_tensors(lambda pixels: self.backbone.preprocess([pixels]), image) for image in images]
        slots = [self.head.context_slots(self.backbone, tensors)[0] for tensors in inputs]
        if stored:
            targets = [{self.head.target_cache[1]: stored[id(image)][0]} for image in target.images]
        else:
            targets = [_tensors(self.head.target, image) for image in target.images]
        captions = [image.caption for image in target.images]
        try:
            "".join([*captions, *(message.text for message in conversation.messages)]).encode()  # no lone surrogates
            layouts = [self.head.layout(tensors, self.config) for tensors in targets]
            sample, truncated = self._truncate_to_fit(conversation, slots, layouts)
        except (TemplateError, UnicodeError) as error:
            raise _Unusable("unfit text", str(error)) from None
        first = len(inputs) - len(sample.images)  # truncation removes images from the left too
        ids, labels = expand_labels(sample, self.backbone.image_token_id, slots[first:])
        starts = [start + len(ids) - len(sample.ids) for start in sample.starts]
        if len(starts) != len(targets):
            raise _Unusable("unfit text", f"{len(starts)} x {self.head.spec.new_tokens[0]} for {len(targets)} images")
        if not self.head.spec.opens and 1 in starts and ids[0] == self.backbone.tokenizer.bos_token_id:
            labels[1] = IGNORE
        return Encoded(ids, labels, starts, inputs[first:], targets, captions, truncated)

    def _truncate_to_fit(
        self, conversation: Conversation, slots: list[int], layouts: list[tuple[list[int], list[int]]]
    ) -> tuple[Example, str]:
        """Return the sample without as much history as needed, and why history was removed. Raises _Unusable."""

        def build(conversation: Conversation) -> Example:
            return example(self.backbone, conversation, self.head.spec.new_tokens[0], layouts)

        def length(sample: Example) -> int:
            images = len(sample.images)
            return len(sample.ids) - images + sum(slots[len(slots) - images :])

        sample = build(conversation)
        if (tokens := length(sample)) <= self.max_length:
            return sample, ""
        reason = f"{tokens} tokens, {self.max_length} fit"
        shorter = history_truncations(conversation)
        least = bisect_left(shorter, True, key=lambda candidate: length(build(candidate)) <= self.max_length)
        if least == len(shorter):
            raise _Unusable("too long", reason)
        return build(shorter[least]), reason

    def batch(self, rows: list[Encoded], skipped: tuple[Skipped, ...] = ()) -> Batch:
        """Pad and stack B samples."""
        inputs = [tensors for row in rows for tensors in row.inputs]
        features = tuple(tensors.pop("features")[0] for tensors in inputs if "features" in tensors)
        each = [tensors for row in rows for tensors in row.targets]
        targets = {name: torch.stack([tensors[name] for tensors in each]) for name in (each[0] if each else {})}
        captions = tuple(caption for row in rows for caption in row.captions)
        encodings = self.caches.encodings(captions) if self.caches else None
        pack = self.config.data.pack if self.config else "none"
        groups = self._groups(rows, pack)
        rows, begins = _packed(groups) if len(groups) < len(rows) else (rows, None)
        starts = [(i, start) for i, row in enumerate(rows) for start in row.starts]
        return Batch(
            ids=_pad([row.ids for row in rows], self.backbone.tokenizer.pad_token_id or 0),
            mask=_pad([[1] * len(row.ids) for row in rows], 0),
            labels=_pad([row.labels for row in rows], IGNORE),
            context_images={key: torch.cat([i[key] for i in inputs]) for key in (inputs[0] if inputs else {})},
            target_rows=tuple(i for i, _ in starts),
            target_starts=tuple(start for _, start in starts),
            begins=begins,
            isolated=pack != "plain",
            targets=targets if encodings is None else targets | {"encodings": encodings},
            captions=captions,
            features=features,
            skipped=skipped,
        )

    def _groups(self, rows: list[Encoded], pack: str) -> list[list[Encoded]]:
        """Return the samples of each row of the batch: as many as fit, or those that leave the least padding.

        These rows have at most D / PARTS tokens, D the LLM's width, or one sample: the scores between samples, which
        are computed and masked, are then 2 % of what the matrices of a layer take.
        """
        if pack == "plain":
            return _grouped(rows, self.max_length)
        longest = max((len(row.ids) for row in rows), default=0)
        lengths: Sequence[int] = [0]
        if pack == "isolated" and self.backbone.packable:
            lengths = range(longest, max(longest, min(int(self.backbone.width / PARTS), self.max_length)) + 1)
        return min((_grouped(rows, length) for length in lengths), key=_num_tokens)


def _grouped(rows: list[Encoded], length: int) -> list[list[Encoded]]:
    """Return samples, in order, in groups of at most `length` tokens; a longer one is alone."""
    groups, room = [], 0
    for row in rows:
        if not groups or len(row.ids) > room:
            groups.append([])
            room = length
        groups[-1].append(row)
        room -= len(row.ids)
    return groups


def _num_tokens(groups: list[list[Encoded]]) -> int:
    """Return the number of tokens of rows that hold these groups, with padding."""
    return len(groups) * max((sum(len(row.ids) for row in group) for group in groups), default=0)


def _packed(groups: list[list[Encoded]]) -> tuple[list[Encoded], Tensor]:
    """Return rows that hold samples one behind another, and where the document of each of their tokens begins (B, T);
    padding is a document of its own. The first tokens of documents have no label, as no token predicts them."""
    packed, begins = [], []
    for group in groups:
        firsts = [0, *accumulate(len(row.ids) for row in group)]
        names = ("ids", "inputs", "targets", "captions")
        ids, inputs, targets, captions = ([v for row in group for v in getattr(row, name)] for name in names)
        labels = [label for row in group for label in (IGNORE, *row.labels[1:])]
        starts = [first + start for first, row in zip(firsts, group, strict=False) for start in row.starts]
        packed.append(Encoded(ids, labels, starts, inputs, targets, captions, ""))
        begins.append([first for first, row in zip(firsts, group, strict=False) for _ in row.ids] + firsts[-1:])
    longest = max(map(len, begins), default=1) - 1
    whole = [[*each, *each[-1:] * (longest + 1 - len(each))][:longest] for each in begins]
    return packed, torch.tensor(whole, dtype=torch.int64).view(len(whole), longest)


def _tensors(convert: Callable[[pil.Image], dict[str, Tensor]], image: Image) -> dict[str, Tensor]:
    """Read an image and convert it to tensors. Raises _Unusable."""
    try:
        return convert(image.load(LEAST))
    except (Mgp5Error, ValueError) as error:  # image processors refuse extreme shapes
        raise _Unusable("broken image", str(error)) from None


def _pad(rows: Sequence[Sequence[int]], value: int) -> Tensor:  # (B, T)
    """Pad rows to the same length on the right."""
    length = max(map(len, rows), default=0)
    padded = [[*row, *[value] * (length - len(row))] for row in rows]
    return torch.tensor(padded, dtype=torch.int64).view(len(rows), length)

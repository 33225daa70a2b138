"""Examples -> a batch of tensors. B samples, T tokens, K pictures to be seen, P pictures to be drawn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING

import torch
from PIL import Image as pil
from torch import Tensor

from .messages import Conversation
from .prompt import IGNORE, example, expand_labels

if TYPE_CHECKING:
    from .backbones import Backbone


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
        pixels: (P, 3, H, W) in [-1, 1], the pictures to be drawn; None when there are none.
        captions: P descriptions, "" where there is none.
    """

    ids: Tensor
    mask: Tensor
    labels: Tensor
    seen: dict[str, Tensor]
    rows: tuple[int, ...]
    starts: tuple[int, ...]
    pixels: Tensor | None
    captions: tuple[str, ...]

    def to(self, device: torch.device) -> Batch:
        """The same batch on a device."""
        moved = {f.name: v.to(device) for f in fields(self) if isinstance(v := getattr(self, f.name), Tensor)}
        return replace(self, **moved, seen={key: value.to(device) for key, value in self.seen.items()})


class Collator:
    """Turns conversations into a Batch; runs in data workers, holds no weights.

    Args:
        backbone: for its tokenizer, template and preprocessing.
        vokens: the voken tokens, e.g. "[IMG0]".
        size: (H, W) pixels of pictures to be drawn.
        max_length: samples with more tokens are left out and counted in `too_long`.
    """

    def __init__(self, backbone: Backbone, vokens: Sequence[str], size: tuple[int, int], max_length: int) -> None:
        self.backbone = backbone
        self.vokens = tuple(vokens)
        self.size = size
        self.max_length = max_length
        self.trigger = backbone.tokenizer.convert_tokens_to_ids(self.vokens[0])
        self.too_long = 0

    def __call__(self, conversations: Sequence[Conversation]) -> Batch | None:
        """None when no sample is left."""
        ids, labels, seen, targets = [], [], [], []
        for conversation in conversations:
            sample = example(self.backbone, conversation, self.vokens)
            pictures = [image.load() for image in sample.images]
            inputs = self.backbone.preprocess(pictures) if pictures else {}
            slots = self.backbone.slots(inputs) if pictures else []
            long_ids, long_labels = expand_labels(sample, self.backbone.image_token_id, slots)
            if len(long_ids) > self.max_length:
                self.too_long += 1
                continue
            ids.append(long_ids)
            labels.append(long_labels)
            seen += [inputs] if pictures else []
            targets += sample.targets
        if not ids:
            return None
        # A run is one target; context never holds vokens, since their spelling is removed from what users write.
        runs = [(row, at) for row, tokens in enumerate(ids) for at, token in enumerate(tokens) if token == self.trigger]
        return Batch(
            ids=_pad(ids, self.backbone.tokenizer.pad_token_id or 0),
            mask=_pad([[1] * len(tokens) for tokens in ids], 0),
            labels=_pad(labels, IGNORE),
            seen={key: torch.cat([inputs[key] for inputs in seen]) for key in (seen[0] if seen else {})},
            rows=tuple(row for row, _ in runs),
            starts=tuple(at for _, at in runs),
            pixels=torch.stack([to_pixels(image.load(), self.size) for image in targets]) if targets else None,
            captions=tuple(image.caption for image in targets),
        )


def to_pixels(picture: pil.Image, size: tuple[int, int]) -> Tensor:
    """PIL RGB -> (3, H, W) in [-1, 1]: shorter side resized, centre cropped; never padded, never flipped."""
    height, width = size
    scale = max(height / picture.height, width / picture.width)
    if scale != 1:
        new = (max(width, round(picture.width * scale)), max(height, round(picture.height * scale)))
        picture = picture.resize(new, pil.Resampling.LANCZOS)
    left, top = (picture.width - width) // 2, (picture.height - height) // 2
    picture = picture.crop((left, top, left + width, top + height))
    data = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
    return data.view(height, width, 3).permute(2, 0, 1).float() / 127.5 - 1


def _pad(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    length = max(len(row) for row in rows)
    return torch.tensor([[*row, *[value] * (length - len(row))] for row in rows])

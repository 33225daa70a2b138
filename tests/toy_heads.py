"""Small heads in the shapes of the other papers, for the tests of the seam.

CodesHead is like SEED: codes that the LLM samples one by one under a mask, and a decoder that paints in steps.
ScalesHead is like VARGPT: it feeds embeddings scale by scale and paints between the LLM's calls.
SideHead is like MM-Interleaved: a layer of the LLM attends to features of all earlier images, and it draws from all
states so far.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import nn

from mgp5.backbones.hf import HFBackbone
from mgp5.config import ModelConfig
from mgp5.heads import (
    HEADS,
    Embeds,
    Forced,
    Head,
    HeadSpec,
    ImageContext,
    Part,
    Prefix,
    Preview,
    Sample,
    Stage,
    Step,
    TrainRule,
)
from mgp5.heads.batch import to_pixels
from mgp5.heads.losses import Losses
from mgp5.loading import backbone_kind
from mgp5.model import InterleavedModel
from mgp5.options import IMAGE_OPTIONS, ImageOptions

SIDE = 8  # pixels


@dataclass(frozen=True, kw_only=True)
class CodesConfig:
    """How many codes there are, and how many make an image."""

    num_codes: int = 12
    length: int = 4


@dataclass(frozen=True, kw_only=True)
class CodesOptions(ImageOptions):
    """Steps of the decoder, and how codes are sampled."""

    steps: int = 3
    code_temperature: float = 1.0

    def problems(self) -> list[str]:
        return [] if 1 <= self.steps <= 9 else [f"steps is {self.steps}, expected 1 to 9"]


class CodesHead(Head):
    """Even positions take even codes, odd ones odd codes, so that a mask of the wrong step is seen."""

    config_type = CodesConfig
    stages = (Stage("tokenizer", "captions", llm=False), Stage("pretrain", "captions"))

    def __init__(self, config: CodesConfig) -> None:
        super().__init__()
        self.config = config
        codes = tuple(f"<code{i}>" for i in range(config.num_codes))
        self.spec = HeadSpec(
            name="codes", new_tokens=("<img>", "</img>", *codes), positions=config.length + 2, losses=("pixels",),
            image_options=CodesOptions,
        )  # fmt: skip
        self.decoder = nn.Sequential(
            nn.Embedding(config.num_codes, 16), nn.Flatten(), nn.Linear(16 * config.length, 192)
        )
        self.calls: list[int] = []

    @classmethod
    def load(cls, config: ModelConfig, dtype: torch.dtype) -> CodesHead:
        return cls(config.head_config)

    @property
    def description(self) -> str:
        return f"{self.config.length} of {self.config.num_codes} codes"

    def parts(self) -> dict[str, Part]:
        return {"decoder": Part(self.decoder, "draw", True)}

    def train_plan(self, config) -> tuple[TrainRule, ...]:
        return TrainRule("trainable_tokens", config.rows_lr), TrainRule(r"^head\.decoder\.", config.lr, 0.1)

    def target(self, image):
        pixels = to_pixels(image, (SIDE, SIDE))
        shades = (
            (pixels.mean((1, 2)).repeat(2)[: self.config.length] + 1) / 2 * (self.config.num_codes // 2 - 1)
        ).long()
        return {"pixels": pixels, "codes": 2 * shades + torch.arange(self.config.length) % 2}

    def layout(self, target, config=None):
        first, last, *codes = self.ids
        ids = [first, *codes[: self.config.length], last]
        return ids, ids

    def complete(self, backbone, batch, config, rng):
        ids, labels = batch.ids.clone(), batch.labels.clone()
        codes = torch.tensor(self.ids[2:])[batch.targets["codes"]]
        for row, start, words in zip(batch.target_rows, batch.target_starts, codes, strict=True):
            at = slice(start + 1, start + 1 + self.config.length)
            ids[row, at] = labels[row, at] = words
        return replace(batch, ids=ids, labels=labels)

    def losses(self, hidden, batch, config, rng) -> Losses:
        painted = self.decoder(batch.targets["codes"]).view(-1, 3, SIDE, SIDE)
        return Losses({"pixels": (painted - batch.targets["pixels"]).square().mean()}, {"pixels": 1.0})

    def draw(self, context):
        first, _, *codes = self.ids
        yield Forced((first,))
        allowed = [codes[i % 2 :: 2] for i in range(self.config.length)]
        options = context.options
        made = yield Sample(self.config.length, allowed, context.rng("codes"), options.code_temperature)
        assert made.hidden.shape[1] == len(made.ids) == self.config.length
        noise = torch.randn(3, SIDE, SIDE, generator=context.rng("noise"))
        canvas = torch.zeros(3, SIDE, SIDE)
        ids = torch.tensor([codes.index(token) for token in made.ids])
        for step in range(options.steps):
            canvas = (yield Step(("paint", options.steps), (ids, canvas, noise))).output
            yield Preview(step + 1, options.steps)
        return canvas.clamp(-1, 1)

    def step(self, key, inputs):
        self.calls.append(len(inputs))
        painted = self.decoder(torch.stack([ids for ids, *_ in inputs])).view(-1, 3, SIDE, SIDE)
        return [c + (p + 0.1 * noise) / key[1] for p, (_, c, noise) in zip(painted, inputs, strict=True)]

    def commit(self, drawn):
        return Forced((self.ids[1],))


class ScalesHead(Head):
    """Feeds 1, 4 and 9 embeddings; the state of a scale paints it and makes the next one's embeddings."""

    stages = (Stage("pretrain", "captions"),)
    scales = (1, 2, 3)

    def __init__(self, width: int) -> None:
        super().__init__()
        self.spec = HeadSpec(
            name="scales", new_tokens=("<gen>", "</gen>"), positions=16, losses=(), image_options=ImageOptions
        )
        self.paint, self.embed = nn.Linear(width, 3), nn.Linear(width, width)
        self.seen: list[int] = []

    def draw(self, context):
        hidden = (yield Forced(self.ids[:1])).hidden
        pixels = torch.zeros(1, 3, SIDE, SIDE)
        for number, scale in enumerate(self.scales, 1):
            embeds = self.embed(hidden.mean(1, keepdim=True)).expand(-1, scale**2, -1).contiguous()
            hidden = (yield Embeds(embeds)).hidden
            self.seen.append(hidden.shape[1])
            colours = self.paint(hidden).transpose(1, 2).view(1, 3, scale, scale)
            pixels = pixels + nn.functional.interpolate(colours, size=SIDE)
            yield Preview(number, len(self.scales))
        return pixels[0].tanh()

    def commit(self, drawn):
        return Forced(self.ids[1:])


class SideHead(Head):
    """Adds to the states behind the first layer the mean of the features of all images that a token may attend to."""

    stages = (Stage("pretrain", "captions"),)

    def __init__(self, width: int) -> None:
        super().__init__()
        self.spec = HeadSpec(
            name="side", new_tokens=("<boi>",), positions=1, losses=(), image_options=ImageOptions, reads_prefix=True,
            reads_side=True,
        )  # fmt: skip
        self.project, self.paint = nn.Linear(width, width), nn.Linear(width, 3)

    def install(self, backbone: HFBackbone) -> None:
        super().install(backbone)

        def attend(layer, inputs, output):
            if backbone.side is None:
                return output
            features, visible, _ = backbone.side
            mask = torch.arange(features.shape[1]) < visible[..., None]  # (B, T, N)
            mean = (mask[..., None] * features[:, None]).sum(2) / mask.sum(-1, keepdim=True).clamp(min=1)
            return output + self.project(mean) * mask.any(-1, keepdim=True)

        backbone.language.layers[0].register_forward_hook(attend)

    def encode_images(self, backbone, inputs) -> ImageContext:
        tokens = backbone.encode_images(inputs)
        return ImageContext(tokens, torch.stack([features[:, : backbone.width].mean(0) for features in tokens]))

    def draw(self, context):
        states = (yield Prefix()).hidden
        yield Forced(self.ids)
        return self.paint(states.mean(1)).tanh()[0, :, None, None].expand(3, SIDE, SIDE)


HEADS["codes"], IMAGE_OPTIONS["codes"] = ("toy_heads", "CodesHead"), CodesOptions


def with_head(folder, head: Head, **config) -> InterleavedModel:
    """A tiny LLM with a head, merged and ready to generate."""
    backbone = HFBackbone.load(folder)
    kind = backbone_kind(backbone)
    fields = {"head": head.spec.name, "head_config": getattr(head, "config", None), "mllm_kind": kind}
    fields["head_kind"] = head.description if isinstance(head, CodesHead) else ""
    return InterleavedModel(backbone, head, ModelConfig(mllm=str(folder), diffusion="", **fields, **config)).eval()

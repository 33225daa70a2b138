"""The head of SEED: an image is K words that the LLM reads and writes (arXiv 2307.08041).

A tokenizer turns the vision tower's tokens of an image into K codes, which are new words of the LLM, between <img> and
</img>. In a reply the LLM samples them one by one, among the codes only; the tokenizer turns them into the condition of
a frozen diffusion model, which draws the image.

Letters: B batch, T tokens, D LLM width, N context images, P target images, K codes, S vision tokens of width V, L
condition length, C condition width, H and W pixels.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..generators.latent_diffusion import LatentDiffusion
from ..generators.seed_tokenizer import STAGES, SeedTokenizer
from ..generators.unclip import StableUnCLIP
from ..options import SeedOptions
from ..prompts import either_way
from . import DrawContext, Drawn, Forced, HeadSpec, ImageContext, Part, Request, Response, Sample, Stage, TrainRule
from .diffusion import DiffusionHead
from .losses import Losses, gather_others
from .seed_release import code_words
from .settings import SeedConfig, SeedTrainConfig

if TYPE_CHECKING:
    import PIL.Image

    from ..backbones import Backbone
    from ..messages import Conversation
    from .batch import Batch


class SeedHead(DiffusionHead):
    """Draw an image from K codes that the LLM samples (sections 2.2 and 3); the generator is frozen."""

    config_type = SeedConfig
    stages = (
        Stage("tokenizer-contrastive", "captions", llm=False, cached=False),
        Stage("tokenizer", "captions", llm=False, cached=False),
        Stage("pretrain", "captions", adapter=True),
        Stage("finetune", "conversations", adapter=True),
    )
    target_cache, context_cache = ("codes", "codes"), "codes"

    def __init__(self, generator: LatentDiffusion, config: SeedConfig) -> None:
        super().__init__()
        self.config, self.spec, self.generator = config, self.spec_of(config), generator
        self.tokenizer = SeedTokenizer(config.tokenizer)

    @classmethod
    def configure(cls, backbone: Backbone, generator: LatentDiffusion, **shape: Any) -> SeedConfig:
        """Return the configuration of a fresh tokenizer over the LLM's vision tower.

        The condition is that of the generator's text, or for Stable unCLIP its image embedding.
        """
        tokenizer = shape.pop("tokenizer")
        by_image = isinstance(generator, StableUnCLIP)
        length, width = (1, generator.image_width) if by_image else generator.condition_shape
        kind = ("image" if tokenizer.detokenizer == "text" else tokenizer.detokenizer) if by_image else "text"
        widths = {"vision_width": backbone.vision_width, "condition_length": length, "condition_width": width}
        words = tokenizer.text_vocab if shape.get("text_tokenizer") else len(backbone.tokenizer)
        return SeedConfig(tokenizer=replace(tokenizer, detokenizer=kind, text_vocab=words, **widths), **shape)

    @staticmethod
    def spec_of(config: SeedConfig) -> HeadSpec:
        """Return the constants of a head whose images have K codes and two words around them."""
        first, *words = code_words(config.tokenizer.codes)
        return HeadSpec(
            name="seed",
            new_tokens=(first, *words),
            positions=config.tokenizer.queries + 2,
            losses=("contrastive", "quantizer", "reconstruction", "condition", "codebook"),
            image_options=SeedOptions,
        )

    def install(self, backbone: Backbone) -> None:
        """Add the words of images to the LLM, and keep hold of its vision tower."""
        super().install(backbone)
        self._backbone = (backbone,)  # in a tuple, so that it is no part of the head

    @property
    def description(self) -> str:
        """Return class, prediction type and condition shape of the generator, and the shape of codes, as text."""
        shape = self.config.tokenizer
        return f"{super().description} by {shape.queries} of {shape.codes} codes"

    def parts(self) -> dict[str, Part]:
        """Return the tokenizer, which is trained, and the frozen parts of the generator."""
        return {"tokenizer": Part(self.tokenizer, "", True)} | self.generator_parts()

    # --- context images ---

    def context_slots(self, backbone: Backbone, inputs: dict[str, Tensor]) -> list[int]:
        """Return K + 2 for each of N preprocessed or cached images."""
        return [self.spec.positions] * len(next(iter(inputs.values())))

    @torch.no_grad()
    def encode_images(self, backbone: Backbone, inputs: dict[str, Tensor]) -> ImageContext:
        """Encode N preprocessed images to words: <img>, K codes, </img>."""
        return self._context(backbone, self.codes(backbone, inputs))

    def cached_images(self, backbone: Backbone, items: Sequence[Tensor]) -> ImageContext:
        """Return the words of N images, from N codes (K,) of a cache."""
        return self._context(backbone, torch.stack(list(items)).to(backbone.device))

    @torch.no_grad()
    def codes(self, backbone: Backbone, inputs: dict[str, Tensor]) -> Tensor:  # (N, K)
        """Return the codes of N preprocessed images."""
        return self.tokenizer.encode(backbone.vision_tokens(inputs))

    @property
    def encoder(self) -> nn.Module:
        """Return the tokenizer from vision tokens to codes."""
        return nn.ModuleList([self.tokenizer.causal, self.tokenizer.encode_layer, self.tokenizer.quantizer])

    def _context(self, backbone: Backbone, codes: Tensor) -> ImageContext:  # (N, K)
        first, words, last = torch.tensor(self.ids, device=codes.device).split([1, len(self.ids) - 2, 1])
        ids = torch.cat([first.expand(len(codes), 1), words[codes.long()], last.expand(len(codes), 1)], dim=1)
        return ImageContext(list(backbone.embed(ids, [])), ids=list(ids))

    # --- training ---

    def train_plan(self, config: SeedTrainConfig) -> tuple[TrainRule, ...]:
        """Return what a stage trains.

        "tokenizer-contrastive": the causal Q-Former. "tokenizer": all behind it. "pretrain" and "finetune": rows of the
        words of images and LoRA, with `config.norms` the norms of the LLM too.
        """
        if config.stage in STAGES:
            causal = config.stage == "tokenizer-contrastive"
            behind = TrainRule(r"^head\.tokenizer\.(?!causal\.)", None if causal else config.lr, config.weight_decay)
            return behind, TrainRule(r"^head\.tokenizer\.", config.lr if causal else None, config.weight_decay)
        rules = [TrainRule("trainable_tokens", config.rows_lr), TrainRule(r"^backbone\..*lora_", config.lr)]
        if config.norms:
            rules.append(TrainRule(r"^backbone\..*(layer_?norm|norm)\.weight$", config.lr))
        return tuple(rules)

    def prepare(self, config: SeedTrainConfig) -> None:
        """Read the encoders that the target of the "tokenizer" stage needs, of texts or images; drop others."""
        by_image = isinstance(self.generator, StableUnCLIP)
        if config.stage != "tokenizer" or by_image:
            self.generator.drop_text_encoders()
        if config.stage == "tokenizer":
            self.generator.require_image_encoder() if by_image else self.generator.read_text_encoders()

    def target(self, image: PIL.Image.Image) -> dict[str, Tensor]:
        """Return {"vision": pixels (3, H, W) for the vision tower}, for Stable unCLIP also {"embedded": (3, H, W)}."""
        targets = {"vision": self._backbone[0].preprocess([image])["pixel_values"][0]}
        if isinstance(self.generator, StableUnCLIP):
            targets["embedded"] = self.generator.preprocess_images([image])[0]
        return targets

    def arrange(self, sample: Conversation, config: SeedTrainConfig) -> Conversation:
        """Return an image and its caption as one text without a prompt, in one of both orders; all of it is learnt then
        (SEED, section 3.2). Without `config.both_ways` the sample stays as it is."""
        return either_way(sample, config.seed) if config.both_ways else sample

    def layout(self, target: dict[str, Tensor], config: SeedTrainConfig | None = None) -> tuple[list[int], list[int]]:
        """Return the ids <img>, K codes, </img> of a target image, all with labels; `complete` fills in the codes."""
        first, code, *_, last = self.ids
        ids = [first, *[code] * self.config.tokenizer.queries, last]
        return ids, list(ids)

    @torch.no_grad()
    def complete(self, backbone: Backbone, batch: Batch, config: SeedTrainConfig, rng: torch.Generator) -> Batch:
        """Fill in the codes of target images, computed from "vision" or taken from a cache of "codes" (P, K)."""
        codes = batch.targets.get("codes")
        if codes is None:
            codes = self.codes(backbone, {"pixel_values": batch.targets["vision"]})
        words = torch.tensor(self.ids[1:-1], device=codes.device)[codes.long()].to(batch.ids.device)  # (P, K)
        ids, labels = batch.ids.clone(), batch.labels.clone()
        for row, start, run in zip(batch.target_rows, batch.target_starts, words, strict=True):
            at = slice(start + 1, start + 1 + len(run))
            ids[row, at] = labels[row, at] = run
        return replace(batch, ids=ids, labels=labels)

    def losses(self, hidden: Tensor | None, batch: Batch, config: SeedTrainConfig, rng: torch.Generator) -> Losses:
        """Return the terms of a tokenizer stage on P target images, see `SeedTokenizer.stage_losses`.

        In the stages of the LLM the codes are words, and the text loss is all.
        """
        if config.stage not in STAGES:
            return Losses()
        features = self._backbone[0].vision_tokens({"pixel_values": batch.targets["vision"]})
        if config.stage == "tokenizer-contrastive":
            more = {"texts": self.texts(batch.captions, config.text_tokens, features.device)}
        else:
            more = {"target": self._condition_target(batch), "weights": config.tokenizer_weights}
        gather = gather_others if batch.together else None
        terms = self.tokenizer.stage_losses(config.stage, features, gather=gather, **more)
        return Losses({k: v for k, (v, _) in terms.items()}, {k: weight for k, (_, weight) in terms.items()})

    @torch.no_grad()
    def _condition_target(self, batch: Batch) -> Tensor:  # (P, L, C)
        if isinstance(self.generator, StableUnCLIP):
            return self.generator.embed_pixels(batch.targets["embedded"])[:, None]
        encodings = batch.targets.get("encodings")  # from a cache
        return self.generator.encode_text(list(batch.captions)) if encodings is None else encodings

    def texts(self, captions: tuple[str, ...], length: int, device: torch.device) -> tuple[Tensor, Tensor]:  # (P, T)
        """Return ids and mask of captions; the first token is the same in all."""
        tokenizer = self.text_tokenizer
        first = tokenizer.cls_token_id if tokenizer.cls_token_id is not None else (tokenizer.bos_token_id or 0)
        texts = [tokenizer.encode(caption, add_special_tokens=False)[: length - 1] for caption in captions]
        width = 1 + max(map(len, texts))
        ids = torch.tensor([[first, *text, *[0] * (width - 1 - len(text))] for text in texts], device=device)
        mask = torch.tensor([[1] * (1 + len(text)) + [0] * (width - 1 - len(text)) for text in texts], device=device)
        return ids, mask

    @cached_property
    def text_tokenizer(self) -> Any:
        """Return the tokenizer of the contrastive stage's texts. Raises Mgp5Error if it cannot be read."""
        if not self.config.text_tokenizer:
            return self._backbone[0].tokenizer
        from transformers import AutoTokenizer

        from ..hub import explain, from_hub

        name = self.config.text_tokenizer
        try:
            return from_hub(name, lambda name, revision: AutoTokenizer.from_pretrained(name, revision=revision))
        except (OSError, ValueError) as error:
            raise explain(error, name) from error

    # --- inference ---

    def condition(self, codes: Tensor) -> Tensor:  # (P, L, C)
        """Return the generator's condition for codes (P, K)."""
        condition = self.tokenizer.condition(codes)
        return (
            self.generator.image_condition(condition[:, 0]) if isinstance(self.generator, StableUnCLIP) else condition
        )

    def make_unconditional(self) -> Tensor:  # (1, L, C)
        """Compute the unconditional condition: zeros, of the empty text, or of codes without a prompt."""
        if self.config.unconditional == "zeros":
            return torch.zeros(1, *self.generator.condition_shape)
        if self.config.unconditional == "codes":
            return self.condition(self.unprompted_codes().to(self.device))
        return self.generator.encode_text([""])

    @torch.no_grad()
    def unprompted_codes(self) -> Tensor:  # (1, K)
        """Return the codes that the LLM finds most likely where a text begins with <img>."""
        backbone = self._backbone[0]
        words = torch.tensor(self.ids[1:-1], device=backbone.device)
        bos = backbone.tokenizer.bos_token_id
        ids = torch.tensor([[*([] if bos is None else [bos]), self.ids[0]]], device=backbone.device)
        codes: list[Tensor] = []
        for _ in range(self.config.tokenizer.queries):
            hidden = backbone(backbone.embed(ids, []), backbone.positions(ids, None))  # few and short, once: no cache
            codes.append(backbone.logits(hidden[:, -1:])[..., words].argmax(-1))
            ids = torch.cat([ids, words[codes[-1]]], dim=1)
        return torch.cat(codes, dim=1)

    def draw(self, context: DrawContext) -> Generator[Request, Response, Drawn]:
        """Draw one image: read <img>, let the LLM sample K codes, denoise from their condition.

        Yields a `Forced`, a `Sample` and what `denoise` yields. The image is not encoded again: its codes stand in the
        sequence. Raises Mgp5Error as `check` does.
        """
        words, options = self.ids[1:-1], context.options
        yield Forced(self.ids[:1])
        chance = options.code_temperature, options.code_top_p, options.code_top_k
        count = self.config.tokenizer.queries
        response = yield Sample(count, [words] * count, context.rng("codes"), *chance)
        codes = torch.tensor([[token - words[0] for token in response.ids]], device=self.device)
        condition = self.condition(codes)
        pixels = yield from self.denoise(condition, context)
        return Drawn(pixels, self._context(self._backbone[0], codes))

    def commit(self, drawn: Drawn) -> Forced:
        """Let the LLM read </img>."""
        return Forced(self.ids[-1:])

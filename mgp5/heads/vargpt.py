"""The head of VARGPT: the LLM's own sequence carries an image scale by scale (arXiv 2501.12327).

After <image_gen_start> the LLM reads the embeddings of one scale after the other, which a projector makes of what was
drawn so far. Its states go through another projector into a decoder, which predicts all codes of that scale at once;
the VQ-VAE turns the sum of all scales into pixels. There is no diffusion.

Letters: B batch, T tokens, D LLM width, E embedding width, P target images, K codes of an image, W width of the
decoder, Z width of a code, h and w size of the features, H and W pixels.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import Mgp5Error
from ..generators.var import (
    VARDecoder,
    guidance_scale,
    guide,
    join_caches,
    sample_codes,
    split_cache,
)
from ..generators.vqvae import VQVAE
from ..options import VARGPTOptions
from ..prompts import IGNORE
from . import (
    DrawContext,
    Drawn,
    Embeds,
    Forced,
    Head,
    HeadSpec,
    Part,
    Preview,
    Request,
    Response,
    Stage,
    Step,
    TrainRule,
)
from .batch import to_pixels
from .losses import Losses
from .settings import VARGPTConfig, VARGPTTrainConfig

if TYPE_CHECKING:
    import PIL.Image

    from ..backbones import Backbone
    from .batch import Batch

TOKENS = ("<image_gen_start>", "<image_gen>", "<image_gen_end>")  # the second stands where embeddings of scales come


@dataclass
class ScaleState:
    """An image between two scales."""

    options: VARGPTOptions
    rng: torch.Generator  # of its codes, on the CPU
    noise: torch.Generator  # of its unconditional states, on the CPU
    f_hat: Tensor  # (1, Z, h, w), the sum of the scales so far
    embeds: Tensor | None  # (1, T, D), of the next scale; None after the last
    cache: Tensor | None = None  # of the decoder, see `VARDecoder.decode_scale`
    states: Tensor | None = None  # (1, T, D), what the LLM made of `embeds`


class Projectors(nn.Module):
    """Two MLPs between the widths of decoder and LLM (VARGPT, 7.2), and the learned unconditional states (K, D)."""

    def __init__(self, config: VARGPTConfig) -> None:
        super().__init__()
        self.to_llm = _projector(config.var.width, config.llm_width, config.norms)
        self.to_decoder = _projector(config.llm_width, config.var.width, config.norms)
        count = sum(config.var.sizes) if config.unconditional == "learned" else 0
        self.unconditional = nn.Parameter(torch.randn(count, config.llm_width) * 0.02)


class VARGPTHead(Head):
    """Draw an image in as many scales as the VQ-VAE has (VARGPT, section 3.1)."""

    config_type = VARGPTConfig
    stages = (
        Stage("var", "captions", llm=False),  # the decoder alone, for who has no published one
        Stage("align", "captions", adapter=True),
        Stage("instruct", "conversations", adapter=True),
        Stage("decode", "conversations", adapter=True),
    )
    target_cache = ("codes", "codes")
    encoder = None

    def __init__(self, generator: VQVAE, config: VARGPTConfig) -> None:
        super().__init__()
        self.config, self.spec, self.generator = config, self.spec_of(config), generator
        self.projectors, self.decoder = Projectors(config), VARDecoder(config.var)
        generator.requires_grad_(False)

    @classmethod
    def configure(cls, backbone: Backbone, generator: VQVAE, **shape: Any) -> VARGPTConfig:
        """Return the configuration of a fresh decoder for the codes of a VQ-VAE and projectors to an LLM.

        Raises Mgp5Error if the generator is another one.
        """
        if not isinstance(generator, VQVAE):
            found = f"the head vargpt draws by a VQVAE, not by {type(generator).__name__}"
            raise Mgp5Error(found, "give MLLM+FOLDER of a VQVAE, see examples/storyland", usage=True)
        codes = {name: getattr(generator.config, name) for name in ("patch_nums", "num_codes", "code_width")}
        return VARGPTConfig(llm_width=backbone.width, var=replace(shape.pop("var"), **codes), **shape)

    @staticmethod
    def spec_of(config: VARGPTConfig) -> HeadSpec:
        """Return the constants of a head whose images take K embeddings and two tokens; 682 as published."""
        return HeadSpec(
            name="vargpt",
            new_tokens=TOKENS,
            positions=sum(config.var.sizes) + 2,
            losses=("codes",),
            image_options=VARGPTOptions,
        )

    @property
    def description(self) -> str:
        """Return the numbers of scales and codes, as text."""
        shape = self.generator.config
        return f"VQVAE {len(shape.patch_nums)} scales, {sum(shape.sizes)} of {shape.num_codes} codes"

    @property
    def device(self) -> torch.device:
        """Return the device of the projectors, which stay there while others wait for their turn."""
        return self.projectors.unconditional.device

    def parts(self) -> dict[str, Part]:
        """Return projectors and decoder, which are trained, and the frozen VQ-VAE, whose codebook each scale needs."""
        return {
            "projectors": Part(self.projectors, "", True),
            "decoder": Part(self.decoder, "draw", True),
            "codebook": Part(self.generator.quantizer, "draw", False),
            "VAE": Part(self.generator, "decode", False),
        }

    # --- training ---

    def train_plan(self, config: VARGPTTrainConfig) -> tuple[TrainRule, ...]:
        """Return what a stage trains (section 3.2, table 2).

        "var": the decoder alone. "align": the projectors. "instruct": the projector of context images, and by
        `config.whole_llm` the LLM. "decode": decoder and projectors. Rows of the new tokens and LoRA train in all
        stages with the LLM, where `config` has rates and an adapter for them.
        """
        draws = config.stage == "decode" or (config.train_decoder and config.stage == "align")
        rates = {
            r"^head\.decoder\.": config.stage == "var" or draws,
            r"^head\.projectors\.": draws or config.stage == "align",
            r"^backbone\..*multi_modal_projector\.": config.stage == "instruct",
            r"^backbone\..*lora_": config.stage != "var",
        }
        rows = config.rows_lr if config.rows_lr and config.stage != "var" else None
        rules = [TrainRule(name, config.lr if on else None, config.weight_decay) for name, on in rates.items()]
        return TrainRule("trainable_tokens", rows), *rules

    def train(self, mode: bool = True) -> VARGPTHead:
        """Put all but the frozen VQ-VAE in training mode, in which that would count hits of codes."""
        super().train(mode)
        self.generator.eval()
        return self

    def prepare(self, config: VARGPTTrainConfig) -> None:
        """Let the decoder recompute its activations, if asked for."""
        self.decoder.checkpointing = config.checkpointing

    def target(self, image: PIL.Image.Image) -> dict[str, Tensor]:
        """Return {"pixels": (3, H, W) in [-1, 1]} of the VQ-VAE's size."""
        return {"pixels": to_pixels(image, (self.generator.native_size,) * 2)}

    def cached_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of "codes" (K,)."""
        return {"codes": (self.spec.positions - 2,)}

    def layout(self, target: dict[str, Tensor], config: VARGPTTrainConfig | None = None) -> tuple[list[int], list[int]]:
        """Return start, K places and end of a target image; the places have no label."""
        start, place, end = self.ids
        count = self.spec.positions - 2
        return [start, *[place] * count, end], [start, *[IGNORE] * count, end]

    @torch.no_grad()
    def complete(self, backbone: Backbone, batch: Batch, config: VARGPTTrainConfig, rng: torch.Generator) -> Batch:
        """Add "codes" (P, K), maybe from a cache, and "classes" (P,), which are dropped with the probability
        `config.guidance_dropout`; with `config.learn_prompts` label all text."""
        codes = batch.targets["codes"] if "codes" in batch.targets else self.generator.encode(batch.targets["pixels"])
        classes = self.decoder.training_classes(len(codes), rng, config.guidance_dropout)
        batch = replace(batch, targets=batch.targets | {"codes": codes.long(), "classes": classes})
        if not config.learn_prompts:
            return batch
        silent = (batch.ids == self.ids[1]) | (batch.ids == backbone.image_token_id) | (batch.mask == 0)
        return replace(batch, labels=batch.ids.masked_fill(silent, IGNORE))

    def embed_targets(self, embeds: Tensor, batch: Batch) -> Tensor:  # (B, T, E)
        """Put the embeddings of all scales in their places, made of the true codes (teacher forcing)."""
        scales = self.projectors.to_llm(self._teacher_embeds(batch))  # (P, K, D)
        embeds = embeds.clone()
        for row, start, values in zip(batch.target_rows, batch.target_starts, scales, strict=True):
            embeds[row, start + 1 : start + 1 + len(values), : values.shape[-1]] = values.to(embeds.dtype)
        return embeds

    def _teacher_embeds(self, batch: Batch) -> Tensor:  # (P, K, W)
        with torch.no_grad():
            vectors = self.generator.quantizer.teacher_inputs(batch.targets["codes"])
        return self.decoder.embed_all(vectors, batch.targets["classes"])

    def losses(self, hidden: Tensor | None, batch: Batch, config: VARGPTTrainConfig, rng: torch.Generator) -> Losses:
        """Return the cross-entropy of K codes of P target images, from the states in their own places (not shifted).

        In stage "var" the decoder reads its own embeddings. Where the class is dropped and unconditional states are
        learned, these take the place of the LLM's.
        """
        if hidden is None:
            batch = self.complete(None, batch, replace(config, learn_prompts=False), rng)
            inputs = self._teacher_embeds(batch)
        else:
            count = self.spec.positions - 2
            starts = zip(batch.target_rows, batch.target_starts, strict=True)
            states = torch.stack([hidden[row, start + 1 : start + 1 + count] for row, start in starts])
            states = states.to(self.projectors.unconditional.dtype)
            if self.config.unconditional == "learned":
                dropped = (batch.targets["classes"] == self.decoder.dropped_class)[:, None, None]
                states = torch.where(dropped, self.projectors.unconditional, states)
            inputs = self.projectors.to_decoder(states)
        logits = self.decoder(inputs, batch.targets["classes"])
        loss = F.cross_entropy(logits.flatten(0, 1), batch.targets["codes"].flatten())
        return Losses({"codes": loss}, {"codes": config.codes_weight})

    # --- inference ---

    def draw(self, context: DrawContext) -> Generator[Request, Response, Tensor]:
        """Draw one image: read <image_gen_start>, then for each scale let the LLM read its embeddings and the decoder
        sample its codes.

        Yields a `Forced`, a `Step` to begin, for each scale an `Embeds`, a `Step` and a `Preview`; a `Step` to decode.
        Returns pixels (3, H, W) in [-1, 1].
        """
        options, total = context.options, len(self.config.var.sizes)
        yield Forced(self.ids[:1])
        state = (yield Step(("begin",), context)).output
        for scale in range(total):
            state.states = (yield Embeds(state.embeds)).hidden
            guided = options.guidance != 1
            yield Step(("scale", scale, guided, options.code_top_k, options.code_top_p), state)
            pixels = None
            if context.shows(scale + 1, total):
                pixels = (yield Step(("decode",), state.f_hat)).output
            yield Preview(scale + 1, total, pixels)
        return (yield Step(("decode",), state.f_hat)).output

    def step(self, key: tuple[Any, ...], inputs: list[Any]) -> list[Any]:
        """Begin several images, decode one scale of them in one call, or decode their features to pixels.

        By the first item of `key`, the inputs of an image and its output are: "begin", DrawContext to ScaleState;
        "scale", that state, which advances; "decode", features (1, Z, h, w) to pixels (3, H, W).
        """
        if key[0] == "begin":
            return [self._begin(context) for context in inputs]
        if key[0] == "scale":
            self._scale(inputs, *key[1:])
            return inputs
        return list(self.generator.decode(torch.cat(inputs)).float())

    def _begin(self, context: DrawContext) -> ScaleState:
        classes = self.decoder.sampling_classes(1, self.config.classes, guided=False)
        embeds = self.projectors.to_llm(self.decoder.start(classes))
        f_hat = self.generator.quantizer.start(1)
        return ScaleState(context.options, context.rng("codes"), context.rng("unconditional"), f_hat, embeds)

    def _scale(self, images: list[ScaleState], scale: int, guided: bool, top_k: int, top_p: float) -> None:
        """Sample the codes of one scale of several images, and make the embeddings of the next one."""
        states = torch.cat([image.states for image in images]).to(self.projectors.unconditional.dtype)  # (B, T, D)
        if guided:
            states = torch.cat([states, self._unconditional_states(images, scale).to(states)])
        classes = self.decoder.sampling_classes(len(images), self.config.classes, guided)
        cache = join_caches([image.cache for image in images])
        logits, cache = self.decoder.decode_scale(self.projectors.to_decoder(states), scale, classes, cache)
        if guided:
            total = len(self.config.var.sizes)
            scales = [guidance_scale(scale, total, image.options.guidance) for image in images]
            logits = guide(*logits.chunk(2), torch.tensor(scales, device=logits.device)[:, None, None])
        codes = sample_codes(logits, top_k, top_p, [image.rng for image in images])
        f_hat, vectors = self.generator.quantizer.next_input(torch.cat([i.f_hat for i in images]), scale, codes)
        embeds = [None] * len(images)
        if vectors is not None:
            vectors = vectors.to(self.decoder.positions.dtype)
            embeds = list(self.projectors.to_llm(self.decoder.embed(vectors, scale + 1)).split(1))
        caches = split_cache(cache, len(images))
        for image, *new in zip(images, f_hat.split(1), embeds, caches, strict=True):
            image.f_hat, image.embeds, image.cache = new

    def _unconditional_states(self, images: list[ScaleState], scale: int) -> Tensor:  # (B, T, D)
        """Return normal noise, by a generator of each image, or the learned states of a scale."""
        if self.config.unconditional == "learned":
            return self.projectors.unconditional[self.config.var.part(scale)].expand(len(images), -1, -1)
        return torch.cat([torch.randn(image.states.shape, generator=image.noise) for image in images])

    def commit(self, drawn: Drawn) -> Forced:
        """Let the LLM read <image_gen_end>."""
        return Forced(self.ids[-1:])


def _projector(width: int, out: int, norm: bool) -> nn.Sequential:
    layers = [nn.Linear(width, width), nn.GELU(), nn.Linear(width, out)]
    return nn.Sequential(*([nn.LayerNorm(width)] if norm else []), *layers)

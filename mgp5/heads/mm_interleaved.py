"""The head of MM-Interleaved: LLM and UNet attend to every earlier image in full detail (arXiv 2401.10208).

An image stands in the sequence as <|beginofimage|> and S visual tokens. Layers of the LLM attend to the feature
pyramids of the images so far (MMFS). When the LLM says <|beginofimage|>, all its states up to there, the last one
first, are resampled to the condition of a Stable Diffusion, whose UNet attends to the pyramids too. The image that was
drawn is encoded into its S slots, and the reply goes on.

Letters: B batch, T tokens, D LLM width, N context images, P target images, S visual tokens of one image, X pixels of
all levels of its pyramid, V width of the vision tower, L condition length, C condition width, H and W pixels.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image as pil
from torch import Tensor

from ..errors import Mgp5Error
from ..generators.latent_diffusion import LatentDiffusion
from ..generators.mmfs import UNetMMFS
from ..generators.stable_diffusion import UNetAdapter
from ..options import MMInterleavedOptions
from ..prompts import IGNORE, either_way
from . import DrawContext, Drawn, Embeds, Forced, HeadSpec, ImageContext, Part, Prefix, Stage, Step, TrainRule
from .batch import from_pixels, to_pixels
from .diffusion import DiffusionHead
from .losses import Losses
from .mm_modules import Conditioner, ImageEncoder, LayersMMFS, reversed_contexts
from .settings import MMInterleavedConfig, MMInterleavedSizes, MMInterleavedTrainConfig

if TYPE_CHECKING:
    from ..backbones import Backbone
    from ..config import TrainConfig
    from ..generators.denoising import DenoisingState
    from ..messages import Conversation
    from . import Request, Response
    from .batch import Batch

TOKENS = ("<|beginofimage|>", "<|image|>")  # the second stands in the slots of target images until they are encoded


class MMInterleavedHead(DiffusionHead):
    """Draw an image from all that was read and seen before it (section 3.2)."""

    config_type = MMInterleavedConfig
    residuals = True
    context_cache = ""  # nor are target images cached: what encodes both is trained
    stages = (Stage("pretrain", "captions"), Stage("finetune", "conversations", adapter=True))

    def __init__(self, generator: LatentDiffusion, config: MMInterleavedConfig) -> None:
        super().__init__()
        self.config, self.spec, self.generator = config, self.spec_of(config), generator
        sizes, unet = config.sizes, generator.denoiser
        self.image_encoder, self.conditioner = ImageEncoder(config), Conditioner(config)
        shapes = self.image_encoder.shapes
        self.llm_mmfs = LayersMMFS(config, shapes)
        options = {"heads": sizes.heads, "points": sizes.points, "images": sizes.images}
        self.unet_mmfs = UNetMMFS(unet.config, config.vision_width, shapes, **options)
        self.unet_mmfs.attach(unet)
        if sizes.unet == "adapter":
            self.unet_adapter = UNetAdapter(unet, sizes.unet_rank)

    @classmethod
    def configure(
        cls, backbone: Backbone, generator: LatentDiffusion, sizes: MMInterleavedSizes | None = None
    ) -> MMInterleavedConfig:
        """Return the configuration of a fresh head. Raises Mgp5Error if the LLM's vision tower is no ViT of its own."""
        vision, inputs = backbone.core.config.vision_config, backbone.preprocess([pil.new("RGB", (64, 64))])
        layers = getattr(getattr(backbone.vision_tower, "encoder", None), "layers", None)
        if layers is None or "image_grid_thw" in inputs:
            case = f"a ViT-Adapter for the vision tower of {backbone.core.config.model_type}"
            raise Mgp5Error(case, "take a LLaVA or a BLIP-2", usage=True)
        return MMInterleavedConfig(
            sizes=sizes or MMInterleavedSizes(),
            llm_width=backbone.width,
            llm_layers=len(backbone.language.layers),
            vision_width=backbone.vision_width,
            vision_layers=len(layers),
            patch=vision.patch_size,
            image_size=tuple(inputs["pixel_values"].shape[2:]),
            condition=generator.condition_shape,
        )

    @staticmethod
    def spec_of(config: MMInterleavedConfig) -> HeadSpec:
        """Return the constants of a head whose images take S slots behind one token; 65 as released."""
        return HeadSpec(
            name="mm-interleaved",
            new_tokens=TOKENS,
            positions=1 + config.sizes.queries,
            losses=("ldm",),
            image_options=MMInterleavedOptions,
            reads_prefix=True,
            reads_side=config.sizes.every > 0,
            opens=False,
        )

    def install(self, backbone: Backbone) -> None:
        """Add the tokens, put <|beginofimage|> before every context image, and MMFS into layers of the LLM."""
        super().install(backbone)
        self._backbone = (backbone,)  # in a tuple, so that it is no part of the head
        backbone.image_token = TOKENS[0] + backbone.image_token.removeprefix(TOKENS[0])
        self.llm_mmfs.attach(backbone, self.config.sizes.every, self.ids[0])

    def parts(self) -> dict[str, Part]:
        """Return the trained parts, and those of the generator: its UNet is one of the first kind if it trains."""
        parts = {
            "image_encoder": Part(self.image_encoder, "encode", True),
            "llm_mmfs": Part(self.llm_mmfs, "", True),
            "conditioner": Part(self.conditioner, "draw", True),
            "unet_mmfs": Part(self.unet_mmfs, "draw", True),
        } | self.generator_parts()
        if self.config.sizes.unet == "full":
            parts["denoiser"] = parts["denoiser"]._replace(saved=True)
        elif self.config.sizes.unet == "adapter":
            parts["unet_adapter"] = Part(self.unet_adapter, "draw", True)
        return parts

    # --- context images ---

    def context_slots(self, backbone: Backbone, inputs: dict[str, Tensor]) -> list[int]:
        """Return S for each of N preprocessed images."""
        return [self.config.sizes.queries] * len(inputs["pixel_values"])

    def encode_images(self, backbone: Backbone, inputs: dict[str, Tensor]) -> ImageContext:
        """Encode N preprocessed images to visual tokens, projected features for the LLM's layers, and pyramids."""
        pixels = inputs["pixel_values"].to(backbone.device, backbone.core.dtype)
        tokens, pyramid = self.image_encoder(backbone.vision_tower, pixels)
        return ImageContext(list(tokens), self.llm_mmfs.values(pyramid), pyramid=pyramid)

    # --- training ---

    def train_plan(self, config: MMInterleavedTrainConfig) -> tuple[TrainRule, ...]:
        """Return what a stage trains (section 3.3): all parts of the head, the UNet by `sizes.unet`, rows of the new
        tokens, and in "finetune" LoRA, if there is any."""
        unet = {"full": config.unet_lr, "adapter": None, "frozen": None}[self.config.sizes.unet]
        return (
            TrainRule("trainable_tokens", config.rows_lr),
            TrainRule(r"^head\..*\.gate$", config.lr),
            TrainRule(r"^head\..*\.offsets\.", config.offsets_lr),
            TrainRule(r"^head\.generator\.unet\.", unet, config.weight_decay),
            TrainRule(r"^head\.unet_adapter\.", config.unet_lr, config.weight_decay),
            TrainRule(r"^head\.(image_encoder|llm_mmfs|conditioner|unet_mmfs)\.", config.lr, config.weight_decay),
            TrainRule(r"^backbone\..*lora_|^backbone\.prefix\.", config.lr, config.weight_decay),
        )

    def prepare(self, config: MMInterleavedTrainConfig) -> None:
        """Begin the unconditional context at the encoding of the empty text, where the generator can encode one; set
        checkpointing; a UNet that trains is in float32."""
        unconditional = self.conditioner.unconditional
        if not unconditional.is_meta and not unconditional.any():
            try:
                unconditional.data.copy_(self.generator.encode_text([""]))
            except Mgp5Error:  # without a text encoder it begins as noise
                torch.nn.init.normal_(unconditional, std=0.02)
        self.generator.drop_text_encoders()
        self.generator.checkpointing(config.checkpointing)
        self.image_encoder.adapter.checkpointing = config.checkpointing
        if self.config.sizes.unet == "full":
            self.generator.denoiser.float()

    def target(self, image: pil.Image) -> dict[str, Tensor]:
        """Return {"pixels": (3, H, W) in [-1, 1] of the generator's size, "vision": pixels for the vision tower}."""
        vision = self._backbone[0].preprocess([image])["pixel_values"][0]
        return {"pixels": to_pixels(image, (self.generator.native_size,) * 2), "vision": vision}

    def arrange(self, sample: Conversation, config: MMInterleavedTrainConfig) -> Conversation:
        """Return an image and its caption as one text, the image before or after it (MM-Interleaved, section 4.1), with
        `config.both_ways`; else the sample."""
        return either_way(sample, config.seed) if config.both_ways else sample

    def layout(
        self, target: dict[str, Tensor], config: MMInterleavedTrainConfig | None = None
    ) -> tuple[list[int], list[int]]:
        """Return <|beginofimage|> and S slots, which have no labels."""
        first, slot = self.ids
        count = self.config.sizes.queries
        return [first, *[slot] * count], [first, *[IGNORE] * count]

    def complete(self, backbone: Backbone, batch: Batch, config: TrainConfig, rng: torch.Generator) -> Batch:
        """Make target images context images of what follows them."""
        if batch.ids.is_meta:  # an estimate, whose context images are encoded already
            return batch
        slot, image = self.ids[1], backbone.image_token_id
        slots = (batch.ids == image) | (batch.ids == slot)
        given = (batch.ids[slots] == image)[:: self.config.sizes.queries]  # (N + P,), in reading order
        places = torch.where(given, given.cumsum(0), given.sum() + (~given).cumsum(0)) - 1
        images = [*batch.context_images.values(), batch.targets["vision"]]
        ids = batch.ids.masked_fill(slots, image)
        return replace(batch, ids=ids, context_images={"pixel_values": torch.cat(images)[places]})

    def losses(self, hidden: Tensor, batch: Batch, config: MMInterleavedTrainConfig, rng: torch.Generator) -> Losses:
        """Return the loss of the generator on P target images, of weight 10 in the paper (eq. 5); that of an image with
        nothing before it is 0.

        With the probability `config.guidance_dropout` the learned unconditional context replaces an image's condition;
        earlier images are seen even then. `rng` on the CPU draws this, timesteps and noise.
        """
        rows, starts = batch.target_rows, batch.target_starts
        states, lengths = reversed_contexts(hidden, rows, starts, batch.target_begins)
        condition = self.conditioner(states, lengths)
        dropped = torch.rand(len(rows), generator=rng) < config.guidance_dropout  # (P,)
        dropped = dropped[:, None, None].to(condition.device)
        condition = torch.where(dropped, self.conditioner.unconditional.to(condition), condition)
        latents = self.generator.sample(self.generator.moments(batch.targets["pixels"]), rng)
        residuals = self.unet_mmfs(*self._earlier(batch, condition))
        loss = self.generator.loss(latents, condition, rng, config.min_snr, residuals=residuals)
        shown = torch.tensor([length > 2 for length in lengths], device=loss.device)
        return Losses({"ldm": (loss * shown).mean()}, {"ldm": config.ldm_weight})

    def _earlier(self, batch: Batch, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return the pyramids (P, N, X, V) of the images before each target, and which of them there are (P, N)."""
        pyramid = batch.context.pyramid if batch.context else None
        if pyramid is None:
            return self._visible([], like)
        slots, count = batch.ids == self._backbone[0].image_token_id, self.config.sizes.queries
        before = slots.flatten().cumsum(0).view(batch.ids.shape) // count  # (B, T), images of the batch up to a token
        numbers = [
            self._chosen(range(int(before[row, begin]), int(before[row, start])), self.config.sizes.earlier)
            for row, start, begin in zip(batch.target_rows, batch.target_starts, batch.target_begins, strict=True)
        ]
        longest = max(map(len, numbers))
        index = torch.tensor([[*each, *[0] * (longest - len(each))] for each in numbers], dtype=torch.long)
        visible = torch.arange(longest) < torch.tensor([[len(each)] for each in numbers])
        return pyramid[index.to(pyramid.device)], visible.to(pyramid.device)

    @staticmethod
    def _chosen(images: Sequence[Any], earlier: str) -> Sequence[Any]:
        """Return those of the images so far that the UNet attends to."""
        return {"all": images, "last": images[-1:], "none": images[:0]}[earlier]

    def _visible(self, pyramids: Sequence[Tensor], like: Tensor) -> tuple[Tensor, Tensor]:
        """Return pyramids (1, X, V) of all images of one as (1, N, X, V), N >= 0, and a mask (1, N) of ones."""
        pixels = sum(h * w for h, w in self.image_encoder.shapes)
        empty = like.new_zeros(len(like), 0, pixels, self.config.vision_width)
        features = torch.stack(list(pyramids), dim=1) if pyramids else empty
        return features, torch.ones(features.shape[:2], dtype=torch.bool, device=like.device)

    # --- inference ---

    def unconditional(self, condition: Tensor) -> Tensor:  # (1, L, C)
        """Return the learned unconditional context."""
        return self.conditioner.unconditional.to(condition)

    def draw(self, context: DrawContext) -> Generator[Request, Response, Drawn]:
        """Draw one image: read <|beginofimage|>, resample all states up to it, denoise, encode what was drawn.

        Yields a `Forced`, a `Prefix`, what `denoise` yields, and a `Step` to encode. Raises Mgp5Error as `check` does.
        """
        yield Forced(self.ids[:1])
        states = (yield Prefix()).hidden
        pixels = yield from self.denoise(states, context)
        return Drawn(pixels, (yield Step(("encode",), pixels)).output)

    def step(self, key: tuple[Any, ...], inputs: list[Any]) -> list[Any]:
        """Run a step as `DiffusionHead.step`; "begin" takes states (1, T, D), and "encode" turns pixels (3, H, W) in
        [-1, 1] to an ImageContext."""
        if key[0] != "encode":
            return super().step(key, inputs)
        backbone = self._backbone[0]
        context = self.encode_images(backbone, backbone.preprocess([from_pixels(pixels) for pixels in inputs]))
        sides = [None] * len(inputs) if context.side is None else context.side.split(1)
        each = zip(context.tokens, sides, context.pyramid.split(1), strict=True)
        return [ImageContext([tokens], side, pyramid=pyramid) for tokens, side, pyramid in each]

    def _begin(self, states: Tensor, context: DrawContext) -> DenoisingState:
        options = context.options
        condition = self.conditioner(states.flip(1))
        images = self._chosen(context.pyramids, options.earlier or self.config.sizes.earlier)
        residuals = self.unet_mmfs(*self._visible(images, condition))
        unconditional = None if options.guidance == 1.0 else self.unconditional(condition)
        return self.generator.begin(condition, unconditional, options, context.rng("noise"), residuals)

    def commit(self, drawn: Drawn) -> Embeds:
        """Let the LLM read the visual tokens of the image."""
        return Embeds(drawn.context.tokens[0][None])

"""The head of MiniGPT-5: K generative vokens, a feature mapper, a latent-diffusion model (arXiv 2310.02239).

An image is a run of special tokens [IMG0]..[IMGK-1]. The LLM predicts the first; the others are forced in one forward.
The states that predict the run are mapped to the condition of a frozen diffusion model, which draws the image.

Letters: B batch, T tokens, D LLM width, P target images, K vokens, L condition length, C condition width, H and W
pixels, Z latent channels, h and w latents.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from PIL import Image as pil
from torch import Tensor, nn

from ..config import MapperConfig, MiniGPT5Config, MiniGPT5TrainConfig
from ..errors import Mgp5Error
from ..generators.latent_diffusion import LatentDiffusion
from ..options import DiffusionOptions
from ..prompts import IGNORE
from . import DrawContext, Forced, HeadSpec, Part, Request, Response, Stage, TrainRule
from .batch import to_pixels
from .diffusion import DiffusionHead
from .losses import Losses, caption_loss

if TYPE_CHECKING:
    from ..backbones import Backbone
    from .batch import Batch

MAX_VOKENS = 16  # the paper's ablation goes from 1 to 16 (MiniGPT-5 2023, appendix C.2)


def voken_tokens(num_vokens: int) -> tuple[str, ...]:
    """Return the special tokens [IMG0]..[IMGK-1]; the first is the trigger. Raises Mgp5Error for K out of range."""
    if not 1 <= num_vokens <= MAX_VOKENS:
        raise Mgp5Error(f"num_vokens is {num_vokens}, expected 1 to {MAX_VOKENS}", "the paper's number is 8")
    return tuple(f"[IMG{index}]" for index in range(num_vokens))


def predicting_states(
    hidden: Tensor,  # (B, T, D)
    rows: Sequence[int],  # (P,) batch row of each run of vokens
    starts: Sequence[int],  # (P,) position of the first voken of each run, at least 1
    num_vokens: int,
) -> Tensor:  # (P, K, D)
    """Return the states that predict the vokens, one position to the left of each.

    These are the states of the last text token and of all vokens but the last. Training and inference both pick them
    here: taking the states *of* the vokens instead is the most likely bug of this method.
    """
    return torch.stack(
        [hidden[row, start - 1 : start - 1 + num_vokens] for row, start in zip(rows, starts, strict=True)]
    )


class MiniGPT5Head(DiffusionHead):
    """Draw an image from the states that predict a run of vokens (MiniGPT-5, section 3.2); the generator is frozen."""

    config_type = MiniGPT5Config
    stages = (Stage("pretrain", "captions"), Stage("finetune", "conversations", adapter=True))
    target_cache = "latents", "moments"

    def __init__(self, generator: LatentDiffusion, config: MiniGPT5Config) -> None:
        super().__init__()
        self.config, self.spec = config, self.spec_of(config)
        self.mapper = FeatureMapper(config.mapper)
        self.generator = generator

    @classmethod
    def configure(
        cls, backbone: Backbone, generator: LatentDiffusion, num_vokens: int = 8, **mapper: Any
    ) -> MiniGPT5Config:
        """Return the configuration of K vokens and a fresh mapper, see `mapper_for`."""
        return MiniGPT5Config(num_vokens=num_vokens, mapper=mapper_for(backbone.width, generator, **mapper))

    @staticmethod
    def spec_of(config: MiniGPT5Config) -> HeadSpec:
        """Return the constants of a head with K vokens. Raises Mgp5Error for K out of range."""
        return HeadSpec(
            name="minigpt5",
            new_tokens=voken_tokens(config.num_vokens),
            positions=config.num_vokens,
            losses=("ldm", "caption"),
            image_options=DiffusionOptions,
        )

    @property
    def num_vokens(self) -> int:
        """Return K, the number of vokens of one image."""
        return self.config.num_vokens

    def parts(self) -> dict[str, Part]:
        """Return the mapper, which is trained, and the frozen parts of the generator."""
        return {"mapper": Part(self.mapper, "", True)} | self.generator_parts()

    # --- training ---

    def train_plan(self, config: MiniGPT5TrainConfig) -> tuple[TrainRule, ...]:
        """Return what a stage trains (section 4.1).

        "pretrain": voken rows of embedding and LM head, and the mapper. "finetune": voken rows, LoRA or prefix, and the
        mapper's transformer; its MLP and queries keep the values of the first stage.
        """
        frozen = []
        if config.stage == "finetune":
            frozen = [TrainRule(r"^head\.mapper\.(mlp\.|queries$)", None)]
        elif not config.train_queries:
            frozen = [TrainRule(r"^head\.mapper\.queries$", None)]
        return (
            TrainRule("trainable_tokens", config.rows_lr, 0.0),  # rows of embedding and LM head: no decay
            TrainRule(r"^backbone\..*lora_|^backbone\.prefix\.", config.lr, config.weight_decay),
            *frozen,
            TrainRule(r"^head\.mapper\.", config.lr, config.weight_decay),
        )

    def prepare(self, config: MiniGPT5TrainConfig) -> None:
        """Choose the source of the unconditional condition, set the generator's checkpointing, read its text encoders
        if captions are encoded."""
        # Without guidance dropout the mapper does not learn it: the encoding of the empty text takes its place.
        self.config = replace(self.config, unconditional="mapper" if config.guidance_dropout else "text")
        self.generator.checkpointing(config.checkpointing)
        if config.caption_weight:
            self.generator.read_text_encoders()
        else:
            self.generator.drop_text_encoders()

    def target(self, image: pil.Image) -> dict[str, Tensor]:
        """Return {"pixels": (3, H, W) in [-1, 1]} of the generator's native size."""
        return {"pixels": to_pixels(image, (self.generator.native_size,) * 2)}

    def layout(
        self, target: dict[str, Tensor], config: MiniGPT5TrainConfig | None = None
    ) -> tuple[list[int], list[int]]:
        """Return K ids and labels of a target image; `config.voken_labels` says which vokens have a text loss.

        "all": the loss is over all tokens (eq. 1). "first": the others are forced at inference and get no label.
        "ends": the first and the last, as in the released code.
        """
        ids, labelled_ids = list(self.ids), "all" if config is None else config.voken_labels
        silent = {"all": (), "first": ids[1:], "ends": ids[1:-1]}[labelled_ids]
        return ids, [IGNORE if token in silent else token for token in ids]

    def losses(self, hidden: Tensor, batch: Batch, config: MiniGPT5TrainConfig, rng: torch.Generator) -> Losses:
        """Return the LDM loss and the caption loss of P target images (section 3.3), means over images.

        Their weights in the paper are 1 and 0.1 in the first stage, 1 and 0 in the second. With the probability
        `config.guidance_dropout` the states of an image are replaced by zeros, which trains the unconditional
        condition. This happens before the MLP, as at inference; the caption target is then the empty text.

        `batch.targets` has "pixels" (P, 3, H, W), or from a cache "moments" (P, 2Z, h, w) and maybe "encodings"
        (P, L, C) of the captions. `rng` on the CPU draws dropout, timesteps and noise.
        """
        states = predicting_states(hidden, batch.target_rows, batch.target_starts, self.num_vokens)  # (P, K, D)
        dropped = torch.rand(len(states), generator=rng) < config.guidance_dropout  # (P,)
        condition = self.mapper(states * ~dropped[:, None, None].to(states.device))
        terms = {}
        if config.ldm_weight:
            moments, at_once = batch.targets.get("moments"), config.generator_batch
            if moments is None:
                pixels = batch.targets["pixels"].split(at_once)
                moments = torch.cat([self.generator.moments(part) for part in pixels])
            latents = self.generator.sample(moments, rng)
            terms["ldm"] = self.generator.loss(latents, condition, rng, config.min_snr, at_once).mean()
        with_text = [i for i, caption in enumerate(batch.captions) if caption or dropped[i]]
        if config.caption_weight and with_text:
            encoding = self._encodings(batch, with_text, dropped).to(condition.device)
            pooled = self.config.mapper.pooled
            terms["caption"] = caption_loss(condition[with_text], encoding, pooled, config.caption_distance)
        return Losses(terms, {"ldm": config.ldm_weight, "caption": config.caption_weight})

    def _encodings(self, batch: Batch, images: list[int], dropped: Tensor) -> Tensor:  # (len(images), L, C)
        cached = batch.targets.get("encodings")
        if cached is None:
            return self.generator.encode_text(["" if dropped[i] else batch.captions[i] for i in images])
        if not dropped.any():
            return cached[images]
        empty = self.generator.encode_text([""]).to(cached)
        return torch.where(dropped[images, None, None].to(empty.device), empty, cached[images])

    # --- inference ---

    def make_unconditional(self) -> Tensor:  # (1, L, C)
        """Compute the unconditional condition: of the empty text, or of the mapper."""
        if self.config.unconditional == "text":
            return self.generator.encode_text([""])
        return self.mapper.unconditional(self.num_vokens)

    def draw(self, context: DrawContext) -> Generator[Request, Response, Tensor]:
        """Draw one image: read the run of vokens, map the states that predict it, denoise step by step, decode.

        Yields a `Forced`, a `Step` to begin, to denoise (each with a `Preview`) and to decode. Returns pixels (3, H, W)
        in [-1, 1]. Raises Mgp5Error as `check` does.
        """
        response = yield Forced(self.ids, self.map_states, capturable=isinstance(self.mapper, FeatureMapper))
        return (yield from self.denoise(response.output, context))

    def map_states(self, states: Tensor) -> Tensor:  # (P, 1 + K, D) -> (P, L, C)
        """Return the conditions of P runs, from the states before the run and after each of its tokens."""
        images, start = len(states), states.shape[1] - self.num_vokens
        predicting = predicting_states(states, range(images), [start] * images, self.num_vokens)
        return self.mapper(predicting)


def mapper_for(llm_width: int, generator: LatentDiffusion, inner: int | None = None, **layers: Any) -> MapperConfig:
    """Return the shape of a mapper; `inner` None takes 1024 for conditions wider than 2048, else the condition's."""
    length, width = generator.condition_shape
    inner = (1024 if width > 2048 else 0) if inner is None else inner
    shape = {"llm_width": llm_width, "width": width, "queries": length, "pooled": generator.pooled_width}
    return MapperConfig(inner=inner, **shape, **layers)


class FeatureMapper(nn.Module):
    """Map the states that predict the vokens to a condition (MiniGPT-5, section 3.2).

    An MLP, then an encoder-decoder transformer whose decoder inputs are L learned queries. The vokens have no position
    embedding and no mask. The stages train different parts, which are named `mlp`, `transformer` and `queries`.

    For Stable Diffusion 1 and 2 the decoder's output is the condition. Stable Diffusion 3, which the paper does not
    cover, needs 333 rows of width 4096 and a pooled vector of 2048. A transformer of that width would have 16 times the
    parameters, so its width is 1024 (`config.inner`) with a projection to C after it; one more query with another
    projection gives the pooled vector.
    """

    def __init__(self, config: MapperConfig) -> None:
        super().__init__()
        self.config = config
        width = config.transformer_width
        self.mlp = nn.Sequential(nn.Linear(config.llm_width, width), nn.GELU(), nn.Linear(width, width))
        if config.kind == "decoder-only":
            self.transformer: nn.Module = _encoder(config, config.encoder_layers + config.decoder_layers)
        else:
            self.transformer = _transformer(config)
            self.queries = nn.Parameter(torch.randn(1, config.queries, width))
        if config.inner:
            self.output = nn.Linear(width, config.width)
        if config.pooled:
            self.pool = nn.Linear(width, config.pooled)

    def forward(self, states: Tensor) -> Tensor:  # (P, K, D) -> (P, L, C)
        """Map the states that predict the vokens to a condition, in the dtype of the mapper's weights.

        Zero states give the unconditional condition of classifier-free guidance.
        """
        source = self.mlp(states.to(self.mlp[0].weight.dtype))  # (P, K, transformer width)
        if self.config.kind == "decoder-only":
            mask = nn.Transformer.generate_square_subsequent_mask(source.shape[1], source.device, source.dtype)
            rows = self._project(self.transformer(source, mask=mask, is_causal=True))
            return F.pad(rows, (0, 0, 0, self.config.queries - rows.shape[1]))
        rows = self.transformer(source, self.queries.expand(states.shape[0], -1, -1))  # (P, L, transformer width)
        if not self.config.pooled:
            return self._project(rows)
        pooled = F.pad(self.pool(rows[:, -1:]), (0, self.config.width - self.config.pooled))  # (P, 1, C)
        return torch.cat([self._project(rows[:, :-1]), pooled], dim=1)

    def unconditional(self, num_vokens: int) -> Tensor:  # (1, L, C)
        """Return the unconditional condition of classifier-free guidance: the mapper applied to zero states."""
        return self(self.mlp[0].weight.new_zeros(1, num_vokens, self.config.llm_width))

    def _project(self, rows: Tensor) -> Tensor:
        return self.output(rows) if self.config.inner else rows


def _encoder(config: MapperConfig, layers: int) -> nn.TransformerEncoder:
    width = config.transformer_width
    layer = nn.TransformerEncoderLayer(
        width, config.heads, width * config.ffn_ratio, dropout=0.0, batch_first=True, norm_first=True
    )
    # Without padding nested tensors gain nothing, and with pre-norm they only cause a warning.
    encoder = nn.TransformerEncoder(layer, layers, nn.LayerNorm(width), enable_nested_tensor=False)
    for parameter in encoder.parameters():
        if parameter.dim() > 1:
            nn.init.xavier_uniform_(parameter)  # as nn.Transformer does: copied layers must not start equal
    return encoder


def _transformer(config: MapperConfig) -> nn.Transformer:
    """Build a pre-norm encoder-decoder with ReLU, without dropout, and with a LayerNorm after each half."""
    width = config.transformer_width
    layer = nn.TransformerDecoderLayer(
        width, config.heads, width * config.ffn_ratio, dropout=0.0, batch_first=True, norm_first=True
    )
    decoder = nn.TransformerDecoder(layer, config.decoder_layers, nn.LayerNorm(width))
    encoder = _encoder(config, config.encoder_layers)
    # nn.Transformer initializes every matrix again, so the decoder's copied layers do not start equal either.
    return nn.Transformer(width, config.heads, custom_encoder=encoder, custom_decoder=decoder, batch_first=True)

"""The head of MiniGPT-5: n generative vokens, a feature mapper, a latent-diffusion model (arXiv 2310.02239).

An image is a run of special tokens [IMG0]..[IMGn-1]. The LLM predicts the first; the others are forced in one forward.
The states that predict the run are mapped to the condition of a frozen diffusion model, which draws.

Letters: B samples, T tokens, D width of the LLM, P target images, n vokens, W width of the mapper's transformer, L
length and C width of a condition.
"""

from __future__ import annotations

from collections.abc import Generator, Hashable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from PIL import Image as pil
from PIL import ImageOps
from torch import Tensor, nn

from ..config import MapperConfig, MiniGPT5Config, ModelConfig, TrainConfig
from ..errors import Mgp5Error
from ..generators import load_generator
from ..generators.latent_diffusion import LatentDiffusion
from ..options import DiffusionOptions
from ..prompts import IGNORE
from . import DrawContext, Forced, Head, HeadSpec, Part, Preview, Request, Response, Step, TrainRule
from .losses import Losses

if TYPE_CHECKING:
    from .batch import Batch

MAX_VOKENS = 16  # the paper's ablation goes from 1 to 16 (MiniGPT-5 2023, appendix C.2)


def voken_tokens(num_vokens: int) -> tuple[str, ...]:
    """Return the special tokens [IMG0]..[IMGn-1]; the first is the trigger. Raises Mgp5Error for n out of range."""
    if not 1 <= num_vokens <= MAX_VOKENS:
        raise Mgp5Error(f"num_vokens is {num_vokens}, expected 1 to {MAX_VOKENS}", "the paper's number is 8")
    return tuple(f"[IMG{index}]" for index in range(num_vokens))


def predicting_states(
    hidden: Tensor,  # (B, T, D)
    rows: Sequence[int],  # (P,) batch row of each run of vokens
    starts: Sequence[int],  # (P,) position of the first voken of each run, at least 1
    num_vokens: int,
) -> Tensor:  # (P, n, D)
    """Return the states that predict the vokens: one position to the left of each (last text token, then all but the
    last voken).

    The one place that picks them, for training and inference alike; taking the states *of* the vokens instead is the
    most likely bug of this method.
    """
    return torch.stack(
        [hidden[row, start - 1 : start - 1 + num_vokens] for row, start in zip(rows, starts, strict=True)]
    )


class MiniGPT5Head(Head):
    """Draws an image from the states that predict a run of vokens (MiniGPT-5, section 3.2).

    Args:
        generator: frozen.
        config: number of vokens, shape of the mapper, and where the unconditional condition comes from.
    """

    def __init__(self, generator: LatentDiffusion, config: MiniGPT5Config) -> None:
        super().__init__()
        self.config = config
        self.spec = HeadSpec(
            name="minigpt5",
            new_tokens=voken_tokens(config.num_vokens),
            positions=config.num_vokens,
            stages=("pretrain", "finetune"),
            losses=("ldm", "caption"),
            image_options=DiffusionOptions,
        )
        self.mapper = FeatureMapper(config.mapper)
        self.generator = generator
        self.empty_text = config.unconditional == "text"
        self._unconditional: Tensor | None = None

    @classmethod
    def load(cls, config: ModelConfig, dtype: torch.dtype) -> MiniGPT5Head:
        """See Head: the generator from its pipeline, the mapper fresh."""
        return cls(load_generator(config.diffusion, dtype), config.head_config)

    @property
    def num_vokens(self) -> int:
        """n, how many vokens stand for one image."""
        return self.config.num_vokens

    @property
    def description(self) -> str:
        """Class, prediction type and condition shape of the generator."""
        length, width = self.generator.condition_shape
        return f"{type(self.generator).__name__} {self.generator.schedule.prediction_type} {length}x{width}"

    @property
    def device(self) -> torch.device:
        """Where the generator computes."""
        return self.generator.device

    def parts(self) -> dict[str, Part]:
        """See Head."""
        return {
            "mapper": Part(self.mapper, "", True),
            "denoiser": Part(self.generator.denoiser, "draw", False),
            "VAE": Part(self.generator.vae, "decode", False),
        } | {
            name.replace("_", " "): Part(module, "", False)
            for name, module in self.generator.named_children()
            if name.startswith("text_encoder")
        }

    # --- training ---

    def train_plan(self, config: TrainConfig) -> tuple[TrainRule, ...]:
        """See Head. pretrain: voken rows and the whole mapper. finetune: voken rows, LoRA or prefix, the mapper's
        transformer; its MLP and queries stay as the first stage left them (section 4.1)."""
        frozen = TrainRule(r"^head\.mapper\.(mlp\.|queries$)", None)
        if config.stage == "pretrain":
            frozen = TrainRule(r"^head\.mapper\.queries$", None)
        return (
            TrainRule("trainable_tokens", config.rows_lr, 0.0),  # rows of embedding and LM head: no decay
            TrainRule(r"^backbone\..*lora_|^backbone\.prefix\.", config.lr, config.weight_decay),
            *([frozen] if config.stage == "finetune" or not config.train_queries else []),
            TrainRule(r"^head\.mapper\.", config.lr, config.weight_decay),
        )

    def prepare(self, config: TrainConfig) -> None:
        """See Head: without guidance dropout the mapper does not learn the unconditional condition."""
        self.empty_text = not config.guidance_dropout
        self.config = MiniGPT5Config(
            num_vokens=self.num_vokens, mapper=self.config.mapper, unconditional="text" if self.empty_text else "mapper"
        )
        self.generator.checkpointing(config.checkpointing)

    def target(self, image: pil.Image) -> dict[str, Tensor]:
        """See Head: pixels (3, H, W) of the generator's native size."""
        return {"pixels": to_pixels(image, (self.generator.native_size,) * 2)}

    def layout(self, target: dict[str, Tensor], config: TrainConfig | None = None) -> tuple[list[int], list[int]]:
        """See Head. The paper's text loss is over all tokens (eq. 1), vokens too; since all but the first are forced at
        inference, "first" leaves the others without a label, and "ends" all but the first and the last, as the release
        does."""
        ids, kept = list(self.ids), "all" if config is None else config.voken_labels
        silent = {"all": (), "first": ids[1:], "ends": ids[1:-1]}[kept]
        return ids, [IGNORE if token in silent else token for token in ids]

    def losses(self, hidden: Tensor, batch: Batch, config: TrainConfig, rng: torch.Generator) -> Losses:
        """See Head: 1 LDM + 0.1 caption in the first stage, 1 LDM in the second (section 3.3).

        Some images see zeros instead of states, which trains the unconditional condition. The zeros go in before the
        MLP, as at inference, and their caption target is the empty text.
        """
        states = predicting_states(hidden, batch.target_rows, batch.target_starts, self.num_vokens)  # (P, n, D)
        dropped = torch.rand(len(states), generator=rng) < config.guidance_dropout  # (P,)
        condition = self.mapper(states * ~dropped[:, None, None].to(states.device))
        terms = {}
        if config.ldm_weight:
            targets = batch.targets
            moments = targets["moments"] if "moments" in targets else self.generator.moments(targets["pixels"])
            latents = self.generator.sample(moments, rng)
            terms["ldm"] = self.generator.loss(latents, condition, rng, config.min_snr).mean()
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

    def unconditional(self, condition: Tensor) -> Tensor:  # (1, L, C)
        """Return the unconditional condition of guidance, computed once and kept until the mapper trains again."""
        kept = self._unconditional
        if kept is None or kept.device != condition.device or self.training:
            zeros = self.mapper.unconditional
            kept = self.generator.encode_text([""]) if self.empty_text else zeros(self.num_vokens)
            self._unconditional = kept = kept.to(condition)
        return kept

    def forget_unconditional(self) -> None:
        """Compute the unconditional condition again: the mapper has changed."""
        self._unconditional = None

    def train(self, mode: bool = True) -> MiniGPT5Head:
        """Switch the mode; training changes the mapper."""
        self.forget_unconditional()
        return super().train(mode)

    def check(self, options: DiffusionOptions) -> None:
        """See Head."""
        self.generator.check(options)

    def draw(self, context: DrawContext) -> Generator[Request, Response, Tensor]:
        """See Head: read the run in one forward, map the states that predict it, denoise step by step, decode."""
        response = yield Forced(self.ids)
        hidden = torch.cat([context.state, response.hidden], dim=1)  # (1, 1 + n, D): the trigger stands at 1
        condition = self.mapper(predicting_states(hidden, [0], [1], self.num_vokens))  # (1, L, C)
        guided = context.options.guidance != 1.0
        unconditional = self.unconditional(condition) if guided else None
        state = self.generator.begin(condition, unconditional, context.options, context.rng("noise"))
        while not state.done:
            yield Step(("denoise", *state.key), state)
            yield Preview(state.step, len(state.table), state.latents)
        response = yield Step(("decode", tuple(state.latents.shape)), state.latents)
        return response.output

    def step(self, key: Hashable, inputs: list[Any]) -> list[Any]:
        """See Head: denoising states advance in place; latents (1, C, h, w) become pixels (3, H, W)."""
        if key[0] == "denoise":
            self.generator.step(inputs)
            return inputs
        return list(self.generator.decode(torch.cat(inputs)))


class FeatureMapper(nn.Module):
    """Map the states of the vokens to a condition: an MLP, then an encoder-decoder that L learned queries read from.

    There is no position on the vokens and no mask. For Stable Diffusion 1 and 2 the decoder's output is the condition.
    Stable Diffusion 3 wants 333 rows of width 4096 and a pooled vector of 2048: a transformer so wide would have 16
    times the parameters, so there W is 1024, as for 2.1, with a projection to C behind it, and one more query with a
    projection of its own gives the pooled vector. (The paper has no recipe; examples/storyland/README.md tries it.)

    The parts are named `mlp`, `transformer` and `queries` because the stages train different ones of them.
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

    def forward(self, states: Tensor) -> Tensor:  # (P, n, D) -> (P, L, C)
        """Map the states that predict the vokens to a condition, in the mapper's own dtype.

        Zero states give the unconditional branch of classifier-free guidance.
        """
        source = self.mlp(states.to(self.mlp[0].weight.dtype))  # (P, n, W)
        if self.config.kind == "decoder-only":
            mask = nn.Transformer.generate_square_subsequent_mask(source.shape[1], source.device, source.dtype)
            rows = self._project(self.transformer(source, mask=mask, is_causal=True))
            return F.pad(rows, (0, 0, 0, self.config.queries - rows.shape[1]))
        rows = self.transformer(source, self.queries.expand(len(states), -1, -1))  # (P, L, W)
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
    # Nested tensors are of no use without padding, and pre-norm would only warn about them.
    encoder = nn.TransformerEncoder(layer, layers, nn.LayerNorm(width), enable_nested_tensor=False)
    for parameter in encoder.parameters():
        if parameter.dim() > 1:
            nn.init.xavier_uniform_(parameter)  # as nn.Transformer does: the copied layers must not start alike
    return encoder


def _transformer(config: MapperConfig) -> nn.Transformer:
    """A pre-norm encoder-decoder with ReLU, no dropout and a LayerNorm behind each half."""
    width = config.transformer_width
    layer = nn.TransformerDecoderLayer(
        width, config.heads, width * config.ffn_ratio, dropout=0.0, batch_first=True, norm_first=True
    )
    decoder = nn.TransformerDecoder(layer, config.decoder_layers, nn.LayerNorm(width))
    encoder = _encoder(config, config.encoder_layers)
    # nn.Transformer draws every matrix anew, so the decoder's copied layers do not start alike either.
    return nn.Transformer(width, config.heads, custom_encoder=encoder, custom_decoder=decoder, batch_first=True)


def caption_loss(condition: Tensor, encoding: Tensor, pooled: int = 0, distance: str = "mse") -> Tensor:
    """Return the distance to the generator's own encoding of the caption (eq. 4), mean over images; both (P, L, C).

    Args:
        pooled: length of the pooled vector in the last row, 0 where there is none. It is a term of its own beside the
            rows: as one row among 334 it would hardly count, and it modulates every layer of the generator.
        distance: "mse", or "l2": GILL's, the Euclidean length of a row's difference (arXiv 2305.17216).
    """
    difference = condition.float() - encoding.float()
    rows = difference[:, :-1] if pooled else difference
    parts = [rows, difference[:, -1:, :pooled]] if pooled else [rows]
    if distance == "l2":
        return torch.stack([part.norm(dim=-1).mean() for part in parts]).sum()
    return torch.stack([part.square().mean() for part in parts]).sum()


def to_pixels(image: pil.Image, size: tuple[int, int]) -> Tensor:  # (3, H, W)
    """Turn an RGB image into a tensor in [-1, 1]: the largest centred part of the size's shape, resized."""
    height, width = size
    image = ImageOps.fit(image, (width, height), pil.Resampling.LANCZOS)
    data = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return data.view(height, width, 3).permute(2, 0, 1).float() / 127.5 - 1

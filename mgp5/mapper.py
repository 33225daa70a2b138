"""The feature mapper: from the states of the vokens to a diffusion model's condition (B batch, N vokens, D width of the
LLM, W width of the transformer, L length and C width of the condition)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import Mgp5Error

KINDS = ("encoder-decoder", "decoder-only")


@dataclass(frozen=True, kw_only=True)
class MapperConfig:
    """The shape of a FeatureMapper; the defaults are the paper's (arXiv 2310.02239, section 3.2).

    Args:
        llm_width: D, width of the LLM's hidden states (4096 for a 7B LLaMA).
        width: C, width of the diffusion model's condition (1024 for Stable Diffusion 2.1).
        queries: L, length of the condition in rows.
        encoder_layers: transformer layers over the vokens.
        decoder_layers: transformer layers over the queries.
        heads: attention heads; must divide the width of the transformer.
        ffn_ratio: hidden width of the feed-forward layers, in units of the transformer's width.
        inner: W, width of the transformer where it is not C; 0 is C, and then there is no output projection.
        pooled: P, length of the pooled vector in the last row (2048 for Stable Diffusion 3), 0 where there is none.
        kind: "decoder-only" is the paper's ablation (table 7): the vokens alone run through causal layers, and what
            comes out is padded with zeros to L rows.

    Raises:
        Mgp5Error: a value that cannot be; all of them are named.
    """

    llm_width: int
    width: int
    queries: int = 77
    encoder_layers: int = 4
    decoder_layers: int = 4
    heads: int = 8
    ffn_ratio: int = 4
    inner: int = 0
    pooled: int = 0
    kind: Literal["encoder-decoder", "decoder-only"] = "encoder-decoder"

    def __post_init__(self) -> None:
        counts = {name: value for name, value in vars(self).items() if isinstance(value, int)}
        least = dict.fromkeys(("inner", "pooled"), 0)
        problems = [
            f"{name} is {value}, expected at least {least.get(name, 1)}"
            for name, value in counts.items()
            if value < least.get(name, 1)
        ]
        if self.heads >= 1 and self.transformer_width % self.heads:
            problems.append(f"width {self.transformer_width} is not a multiple of heads {self.heads}")
        if self.pooled > self.width:
            problems.append(f"pooled {self.pooled} is more than width {self.width}")
        if self.kind not in KINDS:
            problems.append(f"kind is {self.kind!r}, expected {' or '.join(KINDS)}")
        elif self.kind == "decoder-only" and self.pooled:
            problems.append("a decoder-only mapper has no pooled vector")
        if problems:
            raise Mgp5Error("mapper: " + "; ".join(problems), "correct these values in the mapper's settings")

    @property
    def transformer_width(self) -> int:
        """W."""
        return self.inner or self.width


class FeatureMapper(nn.Module):
    """Voken states to condition: an MLP, then an encoder-decoder that L learned queries read from.

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

    def forward(self, states: Tensor) -> Tensor:  # (B, N, D) -> (B, L, C)
        """Map the states that predict the vokens to a condition, in the mapper's own dtype.

        Zero states give the unconditional branch of classifier-free guidance.
        """
        source = self.mlp(states.to(self.mlp[0].weight.dtype))  # (B, N, W)
        if self.config.kind == "decoder-only":
            mask = nn.Transformer.generate_square_subsequent_mask(source.shape[1], source.device, source.dtype)
            rows = self._project(self.transformer(source, mask=mask, is_causal=True))
            return F.pad(rows, (0, 0, 0, self.config.queries - rows.shape[1]))
        rows = self.transformer(source, self.queries.expand(len(states), -1, -1))  # (B, L, W)
        if not self.config.pooled:
            return self._project(rows)
        pooled = F.pad(self.pool(rows[:, -1:]), (0, self.config.width - self.config.pooled))  # (B, 1, C)
        return torch.cat([self._project(rows[:, :-1]), pooled], dim=1)

    def unconditional(self, num_vokens: int) -> Tensor:  # (1, L, C)
        """The condition of guidance's other half: the mapper applied to `num_vokens` zero states."""
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

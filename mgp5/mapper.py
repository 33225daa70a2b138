"""The feature mapper: from the states of the vokens to a diffusion model's condition (B batch, N vokens, D width of the
LLM, L length and C width of the condition)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .errors import Mgp5Error


@dataclass(frozen=True, kw_only=True)
class MapperConfig:
    """The shape of a FeatureMapper; the defaults are the paper's (arXiv 2310.02239, section 3.2).

    Args:
        llm_width: D, width of the LLM's hidden states (4096 for a 7B LLaMA).
        width: C, width of the diffusion model's condition (1024 for Stable Diffusion 2.1).
        queries: L, length of the condition in tokens.
        encoder_layers: transformer layers over the vokens.
        decoder_layers: transformer layers over the queries.
        heads: attention heads; must divide `width`.
        ffn_ratio: hidden width of the feed-forward layers, in units of `width`.

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

    def __post_init__(self) -> None:
        problems = [f"{name} is {value}, expected at least 1" for name, value in vars(self).items() if value < 1]
        if self.heads >= 1 and self.width % self.heads:
            problems.append(f"width {self.width} is not a multiple of heads {self.heads}")
        if problems:
            raise Mgp5Error("mapper: " + "; ".join(problems), "correct these values in the [mapper] settings")


class FeatureMapper(nn.Module):
    """Voken states to condition: an MLP, then an encoder-decoder that L learned queries read from.

    There is no position on the vokens, no mask and no output projection: the decoder's output is the condition.
    The parts are named `mlp`, `transformer` and `queries` because the stages train different ones of them.
    """

    def __init__(self, config: MapperConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.mlp = nn.Sequential(nn.Linear(config.llm_width, width), nn.GELU(), nn.Linear(width, width))
        self.transformer = _transformer(config)
        self.queries = nn.Parameter(torch.randn(1, config.queries, width))

    def forward(self, states: Tensor) -> Tensor:  # (B, N, D) -> (B, L, C)
        """Map the states that predict the vokens to a condition, in the mapper's own dtype.

        Zero states give the unconditional branch of classifier-free guidance.
        """
        source = self.mlp(states.to(self.queries.dtype))  # (B, N, C)
        return self.transformer(source, self.queries.expand(len(states), -1, -1))

    def unconditional(self, num_vokens: int) -> Tensor:  # (1, L, C)
        """The condition of guidance's other half: the mapper applied to `num_vokens` zero states."""
        return self(self.queries.new_zeros(1, num_vokens, self.config.llm_width))


def _transformer(config: MapperConfig) -> nn.Transformer:
    """A pre-norm encoder-decoder with ReLU, no dropout and a LayerNorm behind each half."""
    width = config.width
    layer = {"dropout": 0.0, "batch_first": True, "norm_first": True}
    encoder = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(width, config.heads, width * config.ffn_ratio, **layer),
        config.encoder_layers,
        nn.LayerNorm(width),
        enable_nested_tensor=False,  # no use without padding, and pre-norm would only warn about it
    )
    decoder = nn.TransformerDecoder(
        nn.TransformerDecoderLayer(width, config.heads, width * config.ffn_ratio, **layer),
        config.decoder_layers,
        nn.LayerNorm(width),
    )
    # nn.Transformer draws every matrix anew, so the copied layers do not start alike.
    return nn.Transformer(width, config.heads, custom_encoder=encoder, custom_decoder=decoder, batch_first=True)

"""The feature mapper: from the states of the vokens to a diffusion model's condition (B batch, N vokens, D width of the
LLM, W width of the transformer, L length and C width of the condition)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import MapperConfig


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

"""The next-scale image decoder of VAR and VARGPT (Tian et al., arXiv 2404.02905, section 3.2; VARGPT, 3.1 and 7.1).

A transformer predicts all codes of a scale at once from the scales before it. Inside VARGPT its layers have two sides:
the embeddings of a scale go through the LLM, and what the LLM makes of them goes through the blocks.

Letters: B batch, W width, Z width of a code, V codes of the codebook, n scales, p side of a scale's map, K codes of an
image, T tokens of one scale or of all, S tokens in the cache, N layers, A attention heads, R guidance rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..errors import raise_all
from ..kernels.adaln import adaln_reference, gated_adaln_reference

MAX_SCALE = 100.0  # of a head's queries
EPS = 1e-6  # of layer norms
Pair = tuple[Tensor, Tensor]  # keys and values of a block
ClassMode = Literal["trained", "released"]


@dataclass(frozen=True, kw_only=True)
class VARConfig:
    """The shape of a VARDecoder; the defaults are those of VAR-d30 inside VARGPT."""

    patch_nums: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)  # side of each scale's map, as of the VQVAE
    num_codes: int = 4096  # V
    code_width: int = 32  # Z
    width: int = 1920  # W
    depth: int = 30  # N
    heads: int = 30  # A
    mlp_ratio: int = 4  # hidden width of the feed-forward layers, in units of W
    num_classes: int = 1  # VARGPT's only one is its start token, VAR has the 1,000 of ImageNet; "dropped" comes after
    drop_path: float = 0.125  # probability that the last block leaves a row as it is in training, from 0 of the first
    # Add level and position embeddings to the blocks' inputs too, as the paper says (3.1, 7.3); the release does not.
    positions_twice: bool = False

    def __post_init__(self) -> None:
        counts = ("num_codes", "code_width", "width", "depth", "heads", "mlp_ratio", "num_classes")
        problems = [
            f"{name} is {getattr(self, name)}, expected at least 1" for name in counts if getattr(self, name) < 1
        ]
        if self.width % max(1, self.heads):
            problems.append(f"width {self.width} is not a multiple of heads {self.heads}")
        if not 0 <= self.drop_path < 1:
            problems.append(f"drop_path is {self.drop_path}, expected 0 or more and below 1")
        raise_all(f"var: {problem}" for problem in problems)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Return the number of codes of each scale; their sum is K, 680 in the published model."""
        return tuple(side * side for side in self.patch_nums)

    def part(self, scale: int) -> slice:
        """Return where the codes of a scale are among the K codes of an image."""
        return slice(sum(self.sizes[:scale]), sum(self.sizes[: scale + 1]))


class Attention(nn.Module):
    """Self-attention with queries and keys of length 1 and a learned scale for each head, at most 100."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.to_q, self.to_v, self.to_out = (nn.Linear(width, width) for _ in range(3))
        self.to_k = nn.Linear(width, width, bias=False)
        self.log_scale = nn.Parameter(torch.full((heads, 1, 1), math.log(4.0)))

    def forward(
        self, x: Tensor, mask: Tensor | None, cache: Pair | None
    ) -> tuple[Tensor, Pair]:  # (B, T, W), two of (B, A, S + T, W / A)
        """Attend from x (B, T, W) to itself under a mask (T, T), and to keys and values (B, A, S, W / A) of earlier
        scales.

        Return the output, and all keys and values.
        """
        heads = len(self.log_scale)
        q, k, v = (layer(x).unflatten(-1, (heads, -1)).transpose(1, 2) for layer in (self.to_q, self.to_k, self.to_v))
        q = F.normalize(q, dim=-1) * self.log_scale.clamp(max=math.log(MAX_SCALE)).exp()
        k = F.normalize(k, dim=-1)
        if cache is not None:
            k, v = torch.cat([cache[0], k], 2), torch.cat([cache[1], v], 2)
        mixed = F.scaled_dot_product_attention(q, k, v, mask, scale=1.0)
        return self.to_out(mixed.transpose(1, 2).flatten(2)), (k, v)


class Block(nn.Module):
    """A transformer block whose two layer norms are modulated by a condition (AdaLN)."""

    ops: Any = SimpleNamespace(adaln=adaln_reference, gated_adaln=gated_adaln_reference)  # engines have fused ones

    def __init__(self, config: VARConfig, drop_path: float) -> None:
        super().__init__()
        width, self.drop_path = config.width, drop_path
        self.attention = Attention(width, config.heads)
        self.mlp = nn.Sequential(
            nn.Linear(width, config.mlp_ratio * width),
            nn.GELU(approximate="tanh"),
            nn.Linear(config.mlp_ratio * width, width),
        )
        # Two gates, two scales, two shifts. A fresh block is an ordinary one: gates of 1, nothing modulated.
        self.modulation = nn.Linear(width, 6 * width)
        nn.init.zeros_(self.modulation.weight)
        nn.init.constant_(self.modulation.bias[: 2 * width], 1.0)
        nn.init.zeros_(self.modulation.bias[2 * width :])

    def forward(self, x: Tensor, modulation: Tensor, mask: Tensor | None, cache: Pair | None) -> tuple[Tensor, Pair]:
        """Return x (B, T, W) after attention and MLP, modulated by (B, 6W), and keys and values of `Attention`."""
        gate1, gate2, scale1, scale2, shift1, shift2 = modulation.chunk(6, -1)
        mixed, kv = self.attention(self.ops.adaln(x, scale1, shift1, EPS), mask, cache)
        x, normed = self.ops.gated_adaln(x, self._drop(mixed), gate1, scale2, shift2, EPS)
        return x + self._drop(gate2[:, None] * self.mlp(normed)), kv

    def _drop(self, update: Tensor) -> Tensor:
        """Leave out the updates (B, T, W) of random rows in training (stochastic depth, arXiv 1603.09382)."""
        if not self.training:
            return update
        return update * F.dropout(update.new_ones(len(update), 1, 1), self.drop_path)


class VARDecoder(nn.Module):
    """Predict the codes of an image scale by scale.

    `start` and `embed` make the embeddings of a scale (in VARGPT what the LLM reads), `forward` and `decode_scale`
    the logits of its codes (in VARGPT from what the LLM made of them).
    """

    # What runs a scale, with the arguments of `run_scale`, see `engines.scales`; None: PyTorch.
    engine: Callable[[Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor]] | None = None

    def __init__(self, config: VARConfig) -> None:
        super().__init__()
        self.config = config
        self.checkpointing = False  # recompute the activations of blocks in the backward pass
        self._scales = range(len(config.sizes))
        width = config.width
        self.word_embed = nn.Linear(config.code_width, width)
        self.class_embed = nn.Embedding(config.num_classes + 1, width)
        self.level_embed = nn.Embedding(len(config.patch_nums), width)
        self.positions = nn.Parameter(torch.empty(sum(config.sizes), width))
        self.start_positions = nn.Parameter(torch.empty(config.sizes[0], width))
        for embedding in (self.class_embed.weight, self.level_embed.weight, self.positions, self.start_positions):
            nn.init.trunc_normal_(embedding, std=math.sqrt(1 / (3 * width)))
        rise = config.drop_path / max(1, config.depth - 1)
        self.blocks = nn.ModuleList(Block(config, index * rise) for index in range(config.depth))
        self.head_modulation = nn.Linear(width, 2 * width)
        self.head = nn.Linear(width, config.num_codes)
        nn.init.normal_(self.head.weight, std=0.02)
        for zeros in (self.head_modulation.weight, self.head_modulation.bias, self.head.bias):
            nn.init.zeros_(zeros)

    # --- classes ---

    @property
    def dropped_class(self) -> int:
        """Return the class that stands for none."""
        return self.config.num_classes

    def training_classes(self, count: int, rng: torch.Generator, dropout: float = 0.1) -> Tensor:  # (B,)
        """Return the last class, VARGPT's start token, for each image, or with probability `dropout` the dropped one.

        `rng` is on the CPU.
        """
        dropped = torch.rand(count, generator=rng) < dropout
        return (self.dropped_class - 1 + dropped.long()).to(self.positions.device)

    def sampling_classes(self, count: int, mode: ClassMode, guided: bool) -> Tensor:  # (B,) or (2 * B,)
        """Return the classes of `count` images; where `guided`, the dropped ones of the unconditional rows follow.

        "trained" gives conditional rows the class of training; "released" gives them the dropped one, as the released
        VARGPT does: then the LLM's states alone tell the rows apart.
        """
        first = self.dropped_class - (mode == "trained")
        rows = [first] * count + [self.dropped_class] * (count if guided else 0)
        return torch.tensor(rows, device=self.positions.device)

    # --- embeddings ---

    def _places(self, *scales: int) -> Tensor:  # (T, W)
        """Return level and position embeddings of some scales, one after the other."""
        return torch.cat([self.level_embed.weight[i] + self.positions[self.config.part(i)] for i in scales])

    def start(self, classes: Tensor) -> Tensor:  # (B, T, W)
        """Return the embeddings of the first scale, which shows only the class (B,)."""
        return self.class_embed(classes)[:, None] + self.start_positions + self._places(0)

    def embed(self, vectors: Tensor, scale: int) -> Tensor:  # (B, T, W)
        """Return the embeddings of a later scale from `MultiScaleQuantizer.next_input`'s vectors (B, T, Z)."""
        return self.word_embed(vectors) + self._places(scale)

    def embed_all(self, vectors: Tensor, classes: Tensor) -> Tensor:  # (B, K, W)
        """Return the embeddings of all scales from `MultiScaleQuantizer.teacher_inputs`' vectors and classes (B,)."""
        later = self.word_embed(vectors) + self._places(*self._scales[1:])
        return torch.cat([self.start(classes), later], 1)

    # --- codes ---

    def forward(self, inputs: Tensor, classes: Tensor) -> Tensor:  # (B, K, V)
        """Return the logits of all codes from inputs (B, K, W) of all scales: each sees its own and those before."""
        levels = torch.cat([torch.full((size,), i, device=inputs.device) for i, size in enumerate(self.config.sizes)])
        if self.config.positions_twice:
            inputs = inputs + self._places(*self._scales)
        return self._run(inputs, classes, levels[:, None] >= levels, None)[0]

    def decode_scale(
        self, inputs: Tensor, scale: int, classes: Tensor, cache: Tensor | None
    ) -> tuple[Tensor, Tensor]:  # (B, T, V), (N, 2, B, A, S + T, W / A)
        """Return the logits of one scale from its inputs (B, T, W), and the cache with its keys and values.

        The cache (N, 2, B, A, S, W / A) is that of the scale before; None for the first.
        """
        if self.config.positions_twice:
            inputs = inputs + self._places(scale)
        return (self.engine or self.run_scale)(inputs, classes, cache)

    def run_scale(self, inputs: Tensor, classes: Tensor, cache: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return what `decode_scale` does, of inputs with their positions."""
        logits, kept = self._run(inputs, classes, None, cache)
        return logits, torch.stack([torch.stack(kv) for kv in kept])

    def modulations(self, classes: Tensor) -> list[Tensor]:  # (B, 6W) of each block, (B, 2W) of the head
        """Return what classes (B,) do to the layer norms; it is the same at all scales."""
        condition = F.silu(self.class_embed(classes))
        return [layer(condition) for layer in (*(block.modulation for block in self.blocks), self.head_modulation)]

    def _run(self, x: Tensor, classes: Tensor, mask: Tensor | None, cache: Tensor | None) -> tuple[Tensor, list[Pair]]:
        (*modulations, last), kept = self.modulations(classes), []
        for index, (block, modulation) in enumerate(zip(self.blocks, modulations, strict=True)):
            past = None if cache is None else cache[index].unbind()  # else a compiler would take two for B
            if self.checkpointing and self.training:
                x, kv = checkpoint(block, x, modulation, mask, past, use_reentrant=False)
            else:
                x, kv = block(x, modulation, mask, past)
            if mask is None:  # else nobody reads them: training would hold those of all blocks
                kept.append(kv)
        return self.head(adaln_reference(x, *last.chunk(2, -1), EPS)).float(), kept


def join_caches(caches: Sequence[Tensor | None]) -> Tensor | None:  # (N, 2, R * B, A, S, W / A)
    """Join the caches (N, 2, R, A, S, W / A) of B images: first all conditional rows, then all unconditional ones."""
    return None if caches[0] is None else torch.stack(list(caches), 3).flatten(2, 3)


def split_cache(cache: Tensor, count: int) -> tuple[Tensor, ...]:
    """Return the caches of `count` images that `join_caches` joined."""
    return cache.unflatten(2, (-1, count)).unbind(3)


def guidance_scale(scale: int, num_scales: int, guidance: float) -> float:
    """Return the guidance of a scale, which rises from 1 to `guidance`: 2.5 is the released ramp t = 1.5 * i / 9."""
    return 1 + (guidance - 1) * scale / max(1, num_scales - 1)


def guide(conditional: Tensor, unconditional: Tensor, guidance: float | Tensor) -> Tensor:
    """Return guided logits (VARGPT, equation 3 with lambda = guidance - 1); at 1 they are the conditional ones."""
    return conditional + (guidance - 1) * (conditional - unconditional)


def sample_codes(logits: Tensor, top_k: int, top_p: float, rngs: Sequence[torch.Generator]) -> Tensor:  # (B, T)
    """Sample codes from logits (B, T, V): of the `top_k` likeliest (0: all) the smallest set that reaches `top_p`.

    Each image has a generator on the CPU, so that its codes depend neither on the batch nor on the device: a number in
    [0, 1) for each code says where to look in the cumulative distribution, likely codes first.
    """
    numbers = torch.stack([torch.rand(logits.shape[1], 1, generator=rng) for rng in rngs]).to(logits.device)
    values, order = logits.topk(min(top_k or logits.shape[-1], logits.shape[-1]))
    values = values.softmax(-1)
    reached = values.cumsum(-1)
    last = (reached - values < top_p).sum(-1, keepdim=True).clamp(min=1) - 1
    index = torch.searchsorted(reached, numbers * reached.gather(-1, last), right=True)
    return order.gather(-1, torch.minimum(index, last))[..., 0]  # minimum: sums are rounded

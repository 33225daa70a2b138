"""The stages of SEED's image tokenizer (arXiv 2307.08041), one class each; `seed_tokenizer` ties them together.

Letters: N images, S vision tokens of width V, K causal embeddings and codes of an image, W width of the transformers, E
width of a code, L and C length and width of a generator's condition, T text tokens, P width of the contrastive space.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from math import log
from typing import ClassVar, Literal, NamedTuple, get_args

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Blip2ForImageTextRetrieval, Blip2QFormerConfig, Blip2QFormerModel

from ..errors import Mgp5Error, raise_all

QuantizerLoss = Literal["paper", "legacy"]
Detokenizer = Literal["text", "image", "image-mlp"]
WEIGHTS = (5.0, 2.0, 0.5)  # of stage II: quantizer, reconstruction, condition (released code; the paper has none)
USAGE_DECAY, DEAD, SPLIT = 0.97, 0.05, 0.05  # of the average of hits; below it a code is split; noise over deviation
BETA = 0.25  # of the commitment term (van den Oord et al., arXiv 1711.00937, eq. 3)


@dataclass(frozen=True, kw_only=True)
class SeedTokenizerConfig:
    """The shape of a SEED tokenizer; the defaults are those of version 1, whose condition is Stable Diffusion 1's.
    Raises Mgp5Error that names all bad values."""

    vision_width: int = 1408  # V; 1408 of BLIP-2's ViT-g/14
    queries: int = 32  # K
    width: int = 768  # W
    heads: int = 12  # attention heads everywhere
    causal_layers: int = 12  # of the causal Q-Former; every second one, from the first, reads the vision tokens
    codes: int = 8192  # size of the codebook
    code_width: int = 32  # E
    quantizer_loss: QuantizerLoss = "paper"  # see VectorQuantizer
    split_codes: bool = False  # whether codes that are hardly used in training become copies of those used most
    reconstruction: bool = True  # back to causal embeddings: for stage II and for retrieval by codes
    block_layers: int = 4  # bidirectional blocks behind the codes
    detokenizer: Detokenizer = (
        "text"  # L queries (version 1), one query (version 2), or an MLP over codes (its release)
    )
    reverse_layers: int = 4  # of the reverse Q-Former
    mlp_widths: tuple[int, ...] = (256, 128, 32)  # of the MLP for each code
    condition_length: int = 77  # L; images have one row
    condition_width: int = 768  # C; 1024 of Stable Diffusion 2.1, and of an image embedding of CLIP ViT-H
    text_vocab: int = 30523  # rows of word embeddings of the text path (BERT's and [DEC]); 0: no text path, no stage I
    text_positions: int = 512
    projection: int = 256  # P
    label_smoothing: float = 0.1  # of the contrastive loss
    dropout: float = 0.1  # of the Q-Formers, as BERT has it

    def __post_init__(self) -> None:
        least = dict.fromkeys(("text_vocab", "block_layers"), 0)
        problems = [
            f"{name} is {value}, expected at least {least.get(name, 1)}"
            for name, value in vars(self).items()
            if type(value) is int and value < least.get(name, 1)
        ]
        if self.heads >= 1 and self.width % self.heads:
            problems.append(f"width {self.width} is not a multiple of heads {self.heads}")
        if self.detokenizer != "text" and self.condition_length != 1:
            problems.append(f"condition_length is {self.condition_length}, expected 1 for an image embedding")
        for name in ("label_smoothing", "dropout"):
            if not 0 <= getattr(self, name) < 1:
                problems.append(f"{name} is {getattr(self, name)}, expected 0 or more and below 1")
        for name, words in (("quantizer_loss", get_args(QuantizerLoss)), ("detokenizer", get_args(Detokenizer))):
            if getattr(self, name) not in words:
                problems.append(f"{name} is {getattr(self, name)}, expected {' or '.join(words)}")
        raise_all(f"tokenizer: {problem}" for problem in problems)


def qformer(config: SeedTokenizerConfig, layers: int, reads: int, text: bool = False) -> Blip2QFormerModel:
    """Build a Q-Former of BLIP-2 (arXiv 2301.12597) over states of width `reads`; with `text`, texts have feed-forward
    layers of their own."""
    shape = {"hidden_size": config.width, "intermediate_size": 4 * config.width, "num_hidden_layers": layers}
    dropout = {"hidden_dropout_prob": config.dropout, "attention_probs_dropout_prob": config.dropout}
    options = {"num_attention_heads": config.heads, "encoder_hidden_size": reads, "use_qformer_text_input": text}
    return Blip2QFormerModel(Blip2QFormerConfig(cross_attention_frequency=2, **shape, **dropout, **options))


def fresh_queries(count: int, width: int) -> nn.Parameter:
    """Return learned queries (1, count, width) before training."""
    return nn.Parameter(torch.randn(1, count, width) * 0.02)


class CausalQFormer(nn.Module):
    """Turn the vision tokens of an image into K embeddings, each of which depends on those before it (section 2.2.1).

    The vision tokens are frozen features, before the tower's final LayerNorm (BLIP-2's `post_layernorm`): that norm is
    trained in stage I, and so it is here.
    """

    # Own name -> name in BLIP-2, of what both have.
    BLIP2: ClassVar = {
        "norm.": "vision_model.post_layernorm.",
        "queries": "query_tokens",
        "transformer.": "qformer.",
        "words.": "embeddings.word_embeddings.",
        "positions.": "embeddings.position_embeddings.",
        "image_projection.": "vision_projection.",
        "text_projection.": "text_projection.",
    }

    def __init__(self, config: SeedTokenizerConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.vision_width)
        self.queries = fresh_queries(config.queries, config.width)
        self.transformer = qformer(config, config.causal_layers, config.vision_width, bool(config.text_vocab))
        if config.text_vocab:
            self.words = nn.Embedding(config.text_vocab, config.width)
            self.positions = nn.Embedding(config.text_positions, config.width)
            self.image_projection = nn.Linear(config.width, config.projection)
            self.text_projection = nn.Linear(config.width, config.projection)
            self.log_temperature = nn.Parameter(torch.tensor(log(0.07)))  # its logarithm, which keeps it positive
            for table in (self.words, self.positions):
                nn.init.normal_(table.weight, std=0.02)

    def forward(self, features: Tensor) -> Tensor:  # (N, K, W)
        """Return the causal embeddings of vision tokens (N, S, V).
        Queries attend to themselves and earlier ones, whatever their number, and to all vision tokens."""
        queries = self.queries.expand(len(features), -1, -1)
        mask = queries.new_full((1, 1, queries.shape[1], queries.shape[1]), -torch.inf).triu(1)  # added to the scores
        features = self.norm(features.to(self.norm.weight.dtype))
        outputs = self.transformer(query_embeds=queries, attention_mask=mask, encoder_hidden_states=features)
        return outputs.last_hidden_state

    def image_features(self, embeddings: Tensor) -> Tensor:  # (N, P)
        """Return unit vectors of causal embeddings (N, K, W), or of those reconstructed from codes: the last of K."""
        return F.normalize(self.image_projection(embeddings[:, -1]), dim=-1)

    def text_features(self, ids: Tensor, mask: Tensor) -> Tensor:  # (N, P)
        """Return unit vectors of texts (N, T), mask 1 for tokens and 0 for padding: the state of the first token, which
        is the same in all texts ([CLS] for BERT's vocabulary). This path is bidirectional and reads no image.

        Raises Mgp5Error if the text is too long.
        """
        if ids.shape[1] > len(self.positions.weight):
            limit = f"expected at most {len(self.positions.weight)}"
            raise Mgp5Error(f"texts of {ids.shape[1]} tokens, {limit}", "cut them when they are tokenized")
        embeds = self.words(ids) + self.positions.weight[: ids.shape[1]]
        # transformers looks into the values of a mask of two axes, and estimates have none
        added = torch.where(mask.bool(), 0.0, -torch.inf)[:, None, None].to(embeds.dtype)
        states = self.transformer(query_embeds=embeds, query_length=0, attention_mask=added).last_hidden_state
        return F.normalize(self.text_projection(states[:, 0]), dim=-1)

    @torch.no_grad()
    def start_from(self, blip2: Blip2ForImageTextRetrieval) -> None:
        """Copy norm, queries and Q-Former of a BLIP-2, and its text path where this has one (section 2.2.1).
        Raises Mgp5Error if a shape differs."""
        state = blip2.state_dict()
        for name, value in self.named_parameters():
            ours = next((ours for ours in self.BLIP2 if name.startswith(ours)), None)
            if ours is None:  # the temperature
                continue
            found = state[self.BLIP2[ours] + name.removeprefix(ours)]
            if found.shape != value.shape:
                case = f"{name} has shape {tuple(value.shape)}, that of BLIP-2 {tuple(found.shape)}"
                raise Mgp5Error(case, "change the tokenizer's configuration")
            value.copy_(found)


def contrastive_loss(
    images: Tensor,  # (N, P), unit vectors; row i belongs to row i of the texts
    texts: Tensor,  # (N, P)
    temperature: Tensor,
    label_smoothing: float,
    others: tuple[Tensor, Tensor] | None = None,  # images and texts (M, P) of other processes: more negatives
) -> Tensor:
    """Return the mean of the cross-entropies of texts given an image and of images given a text (section 2.2.1)."""
    labels = torch.arange(len(images), device=images.device)
    all_images, all_texts = (
        (images, texts) if others is None else map(torch.cat, zip((images, texts), others, strict=True))
    )
    losses = [
        F.cross_entropy((one @ many.T).float() / temperature, labels, label_smoothing=label_smoothing)
        for one, many in ((images, all_texts), (texts, all_images))
    ]
    return (losses[0] + losses[1]) / 2


class Quantized(NamedTuple):
    """The result of quantization."""

    vectors: Tensor  # (N, K, E), the nearest entries of the codebook; gradients pass to what was quantized
    codes: Tensor  # (N, K), their indices
    loss: Tensor  # scalar


class VectorQuantizer(nn.Module):
    """Replace vectors by the nearest entries of a learned codebook (van den Oord et al., arXiv 1711.00937, section 3).

    With z the vectors and e the entries, the paper's loss is |sg(z) - e|^2 + 0.25 |z - sg(e)|^2 (there eq. 3), that of
    the release ("legacy") has the factor at the other term: 0.25 |sg(z) - e|^2 + |z - sg(e)|^2; both as means.
    """

    def __init__(self, config: SeedTokenizerConfig) -> None:
        super().__init__()
        self.legacy = config.quantizer_loss == "legacy"
        self.codebook = nn.Embedding(config.codes, config.code_width)
        nn.init.uniform_(self.codebook.weight, -1 / config.codes, 1 / config.codes)
        if config.split_codes:  # moving average of hits, in units of their mean
            self.register_buffer("usage", torch.ones(config.codes))

    @torch.no_grad()
    def split(self) -> None:
        """Make codes of less than DEAD hits near copies of those that have most, and share the hits between both
        (Linde, Buzo and Gray, 1980). Nothing but the state decides, which all processes share."""
        order, table = self.usage.argsort(), self.codebook.weight
        count = min(int((self.usage < DEAD).sum()), int((self.usage > 1).sum()))
        dead, full = order[:count], order.flip(0)[:count]
        noise = torch.randn(table.shape, generator=torch.Generator().manual_seed(0)).to(table)
        table[dead] = table[full] + SPLIT * table.std() * noise[dead]
        self.usage[dead] = self.usage[full] = self.usage[full] / 2

    def nearest(self, vectors: Tensor) -> Tensor:  # (...)
        """Return the code of each vector (..., E), computed in float64, which autocast leaves alone: half precision
        would choose others."""
        table = self.codebook.weight.double()
        return (table.square().sum(1) - 2 * vectors.double() @ table.T).argmin(-1)

    def forward(self, vectors: Tensor, gather: Callable[[Tensor], Tensor] | None = None) -> Quantized:
        """Quantize vectors (N, K, E) with the straight-through estimator; `gather` as in `SeedTokenizer.stage_losses`,
        without which several processes count no hits."""
        counted = hasattr(self, "usage") and self.training and not vectors.is_meta  # an estimate has no numbers
        counted = counted and (gather is not None or not dist.is_initialized() or dist.get_world_size() == 1)
        if counted:
            self.split()
        codes = self.nearest(vectors)
        if counted:
            hits = torch.bincount(codes.flatten(), minlength=len(self.usage)).to(self.usage)
            hits = hits if gather is None else hits + gather(hits[None]).sum(0)
            self.usage.lerp_(hits / hits.mean(), 1 - USAGE_DECAY)
        entries, vectors = self.codebook(codes).float(), vectors.float()
        codebook = F.mse_loss(entries, vectors.detach())
        commitment = F.mse_loss(vectors, entries.detach())
        loss = BETA * codebook + commitment if self.legacy else codebook + BETA * commitment
        return Quantized(vectors + (entries - vectors).detach(), codes, loss)


class CodeDecoder(nn.Module):
    """Bidirectional pre-norm blocks over what the codes were decoded to, with learned positions (section 2.2.2)."""

    def __init__(self, config: SeedTokenizerConfig) -> None:
        super().__init__()
        shape = {"d_model": config.width, "nhead": config.heads, "dim_feedforward": 4 * config.width, "dropout": 0.0}
        options = {"activation": "gelu", "batch_first": True, "norm_first": True, "layer_norm_eps": 1e-6}
        self.positions = nn.Parameter(torch.randn(1, config.queries, config.width) * 0.02)
        self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(**shape, **options) for _ in range(config.block_layers))

    def forward(self, decoded: Tensor) -> Tensor:  # (N, K, W)
        """Run the blocks over (N, K, W)."""
        decoded = decoded + self.positions
        for block in self.blocks:
            decoded = block(decoded)
        return decoded


class ReverseQFormer(nn.Module):
    """Let L queries read the decoded codes and become a generator's condition (section 2.2.2)."""

    def __init__(self, config: SeedTokenizerConfig) -> None:
        super().__init__()
        self.queries = fresh_queries(config.condition_length, config.width)
        self.transformer = qformer(config, config.reverse_layers, config.width)
        self.projection = nn.Linear(config.width, config.condition_width)

    def forward(self, decoded: Tensor) -> Tensor:  # (N, L, C)
        """Return the condition for decoded codes (N, K, W)."""
        queries = self.queries.expand(len(decoded), -1, -1)
        states = self.transformer(query_embeds=queries, encoder_hidden_states=decoded).last_hidden_state
        return self.projection(states)


class CodeMLP(nn.Module):
    """Make each decoded code narrow and all of them together an image embedding, as SEED-2's release does."""

    def __init__(self, config: SeedTokenizerConfig) -> None:
        super().__init__()
        widths = (config.width, *config.mlp_widths)
        layers = [nn.Linear(before, after, bias=False) for before, after in pairwise(widths)]
        self.layers = nn.ModuleList(layers)
        self.projection = nn.Linear(config.queries * widths[-1], config.condition_width)

    def forward(self, decoded: Tensor) -> Tensor:  # (N, 1, C)
        """Return the image embedding for decoded codes (N, K, W); ReLU between the layers, not after the last."""
        for layer in self.layers[:-1]:
            decoded = layer(decoded).relu()
        return self.projection(self.layers[-1](decoded).flatten(1))[:, None]

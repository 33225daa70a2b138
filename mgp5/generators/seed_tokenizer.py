"""SEED's image tokenizer (arXiv 2307.08041): an image becomes K codes, and codes become a generator's condition.

    vision tokens -> causal Q-Former -> encode layer -> quantizer -> codes
    codes -> decode layer -> bidirectional blocks -> reverse Q-Former -> condition

Letters as in `seed_stages`: N images, H and W pixels, S vision tokens of width V, K codes, E width of a code, L and C
of a condition, T text tokens, M texts of other processes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Blip2ForImageTextRetrieval, Blip2VisionModel, CLIPImageProcessorPil

from ..errors import Mgp5Error
from ..hub import explain, from_hub
from .seed_stages import (
    WEIGHTS,
    CausalQFormer,
    CodeDecoder,
    CodeMLP,
    ReverseQFormer,
    SeedTokenizerConfig,
    VectorQuantizer,
    contrastive_loss,
)

if TYPE_CHECKING:
    import PIL.Image

STAGES = ("tokenizer-contrastive", "tokenizer")
Terms = dict[str, tuple[Tensor, float]]  # name of a loss -> scalar and weight


class SeedTokenizer(nn.Module):
    """The whole tokenizer without the vision tower; the same modules run in training and inference.

    Its inputs are frozen vision tokens (N, S, V): every output token of the tower, [CLS] included, before its last
    LayerNorm, as `SeedVision` returns them for BLIP-2's ViT-g/14 (257 tokens of 224 x 224 pixels).
    """

    def __init__(self, config: SeedTokenizerConfig) -> None:
        super().__init__()
        self.config = config
        self.causal = CausalQFormer(config)
        width, narrow = config.width, config.code_width
        self.encode_layer = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, narrow))
        self.quantizer = VectorQuantizer(config)
        self.decode_layer = nn.Sequential(nn.Linear(narrow, narrow), nn.Tanh(), nn.Linear(narrow, width))
        self.reconstruction = CodeDecoder(config) if config.reconstruction else None
        self.generation = CodeDecoder(config)  # towards the condition
        self.reverse = (CodeMLP if config.detokenizer == "image-mlp" else ReverseQFormer)(config)

    @torch.no_grad()
    def embeddings(self, features: Tensor) -> Tensor:  # (N, K, W)
        """Return the causal embeddings, without dropout whatever the mode: it would move the codes."""
        mode = self.causal.training
        embeddings = self.causal.eval()(features)
        self.causal.train(mode)
        return embeddings

    @torch.no_grad()
    def encode(self, features: Tensor) -> Tensor:  # (N, K), int64
        """Return the codes of images, each in [0, `config.codes`)."""
        return self.quantizer.nearest(self.encode_layer(self.embeddings(features)))

    @property
    def detokenizer(self) -> nn.Module:
        """Return what makes a condition of codes."""
        return nn.ModuleList([self.quantizer, self.decode_layer, self.generation, self.reverse])

    def condition(self, codes: Tensor) -> Tensor:  # (N, L, C)
        """Return the condition for codes (N, K): text states, or an image embedding as one row."""
        return self._generate(self.quantizer.codebook(codes))

    def reconstruct(self, codes: Tensor) -> Tensor:  # (N, K, W)
        """Return the causal embeddings that codes (N, K) stand for (section 2.2.2, "causal codes").

        Raises Mgp5Error if the tokenizer was read without the blocks that do it.
        """
        return self._reconstruct(self.quantizer.codebook(codes))

    def _reconstruct(self, entries: Tensor) -> Tensor:  # (N, K, W)
        if self.reconstruction is None:
            raise Mgp5Error("this tokenizer has no blocks of reconstruction", "train one, or read other files")
        return self.reconstruction(self.decode_layer(entries))

    def _generate(self, entries: Tensor) -> Tensor:  # (N, L, C)
        return self.reverse(self.generation(self.decode_layer(entries)))

    def stage_losses(
        self,
        stage: str,
        features: Tensor,  # (N, S, V)
        *,
        texts: tuple[Tensor, Tensor] | None = None,  # ids and mask (N, T) of the captions, for stage I
        gather: Callable[[Tensor], Tensor] | None = None,  # (N, P) -> (M, P), the same of all other processes
        target: Tensor | None = None,  # (N, L, C), the frozen generator's condition of caption or image, for stage II
        weights: tuple[float, float, float] = WEIGHTS,  # of stage II
    ) -> Terms:
        """Return the loss terms of a stage and their weights; "codebook" has weight 0: it is the share of codes in use.

        Stage I is the contrastive loss alone. Stage II weighs the quantizer's loss, 1 - cosine of causal embeddings and
        their reconstruction, and the mean squared error of the condition. Raises Mgp5Error if the stage's input is
        missing, or there is no such stage.
        """
        if stage == "tokenizer-contrastive" and texts is not None and self.config.text_vocab:
            return {"contrastive": (self._contrastive(features, texts, gather), 1.0)}
        if stage == "tokenizer" and target is not None:
            return self.code_losses(self.embeddings(features), target, weights, gather)
        needs = "tokenizer-contrastive takes texts and a text path, tokenizer a target"
        raise Mgp5Error(f"no losses of stage {stage!r} for these inputs, expected one of {', '.join(STAGES)}", needs)

    def code_losses(
        self,
        embeddings: Tensor,  # (N, K, W), frozen
        target: Tensor,  # (N, L, C)
        weights: tuple[float, float, float] = WEIGHTS,
        gather: Callable[[Tensor], Tensor] | None = None,
    ) -> Terms:
        """Return the loss terms of stage II for causal embeddings; arguments as in `stage_losses`."""
        entries, codes, loss = self.quantizer(self.encode_layer(embeddings), gather)
        rebuilt = self._reconstruct(entries).float()
        distance = 1 - F.cosine_similarity(rebuilt, embeddings.float(), dim=-1).mean()
        error = F.mse_loss(self._generate(entries).float(), target.float())
        used = torch.zeros(self.config.codes, device=codes.device).index_fill(0, codes.flatten(), 1).mean()
        losses = zip((loss, distance, error, used), (*weights, 0.0), strict=True)
        return dict(zip(("quantizer", "reconstruction", "condition", "codebook"), losses, strict=True))

    def _contrastive(
        self, features: Tensor, texts: tuple[Tensor, Tensor], gather: Callable[[Tensor], Tensor] | None
    ) -> Tensor:
        images, captions = self.causal.image_features(self.causal(features)), self.causal.text_features(*texts)
        others = None if gather is None else (gather(images), gather(captions))
        temperature = self.causal.log_temperature.exp()
        return contrastive_loss(images, captions, temperature, self.config.label_smoothing, others)


def load_blip2(name: str, dtype: torch.dtype = torch.float32) -> Blip2ForImageTextRetrieval:
    """Load vision tower and Q-Former of a BLIP-2 from a folder or hub id; language models of others are not read.

    Salesforce/blip2-itm-vit-g has the text path too; without it that part is random. Raises Mgp5Error if there is none.
    """

    def load(name: str, revision: str | None) -> Blip2ForImageTextRetrieval:
        return Blip2ForImageTextRetrieval.from_pretrained(name, revision=revision, dtype=dtype)

    try:
        return from_hub(name, load)
    except (OSError, ValueError) as error:
        raise explain(error, name) from error


class SeedVision(nn.Module):
    """The frozen vision tower of a BLIP-2; SEED's is EVA-CLIP's ViT-g/14 with 224 x 224 pixels, V = 1408."""

    def __init__(self, tower: Blip2VisionModel) -> None:
        super().__init__()
        self.tower = tower.requires_grad_(False).eval()
        self.tower.post_layernorm = nn.Identity()  # `CausalQFormer` has it
        size = tower.config.image_size
        # Both sides are resized, nothing is cropped; mean and deviation are CLIP's, the default.
        square = {"height": size, "width": size}
        self.processor = CLIPImageProcessorPil(size=square, do_center_crop=False, resample=3)

    @classmethod
    def load(cls, name: str, dtype: torch.dtype = torch.float32) -> SeedVision:
        """Load the tower of a BLIP-2, such as Salesforce/blip2-itm-vit-g. Raises Mgp5Error as `load_blip2`."""
        return cls(load_blip2(name, dtype).vision_model)

    def train(self, mode: bool = True) -> SeedVision:
        """Stay in evaluation mode: this tower is frozen."""
        return super().train(False)

    def preprocess(self, images: Sequence[PIL.Image.Image]) -> Tensor:  # (N, 3, H, W)
        """Return the pixels of N images; runs in data workers."""
        return self.processor([image.convert("RGB") for image in images], return_tensors="pt").pixel_values

    @torch.no_grad()
    def forward(self, pixels: Tensor) -> Tensor:  # (N, S, V)
        """Return the vision tokens of pixels (N, 3, H, W)."""
        return self.tower(pixel_values=pixels.to(self.tower.device, self.tower.dtype)).last_hidden_state

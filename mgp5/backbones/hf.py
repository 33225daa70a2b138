"""Any transformers AutoModelForImageTextToText as a backbone. B batch, T tokens, D width, S slots of one picture.

Proved on the LLaVA-1.5 and Qwen2.5-VL classes. Only three things differ between families and live here: how a
picture is written in the chat template, how many slots it takes, and where rotary positions come from.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer, DynamicCache
from transformers.modeling_outputs import ModelOutput

from ..errors import Mgp5Error

if TYPE_CHECKING:
    import PIL.Image

# How pictures are written in a prompt: (text in the template, repeated token), by model_type.
PICTURE_MARKS = {
    "qwen2_5_vl": ("<|vision_start|><|image_pad|><|vision_end|>", "<|image_pad|>"),
    "qwen2_vl": ("<|vision_start|><|image_pad|><|vision_end|>", "<|image_pad|>"),
    "qwen3_vl": ("<|vision_start|><|image_pad|><|vision_end|>", "<|image_pad|>"),
}


class HFBackbone(nn.Module):
    """A frozen multimodal LLM of transformers, called in parts so that hidden states and the cache stay ours."""

    def __init__(self, model: nn.Module, tokenizer: Any, image_processor: Any) -> None:
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        config = model.config
        text = config.get_text_config()
        self.width: int = text.hidden_size
        self.context_length: int = text.max_position_embeddings
        self.image_token_id: int = config.image_token_id
        mark = tokenizer.convert_ids_to_tokens(config.image_token_id)
        self.image_token: str = PICTURE_MARKS.get(config.model_type, (mark, mark))[0]
        stops = getattr(model.generation_config, "eos_token_id", None)
        listed = stops if isinstance(stops, list) else [stops]
        self.stop_ids = frozenset(i for i in [*listed, tokenizer.eos_token_id] if i is not None)

    @classmethod
    def load(
        cls,
        name: str | Path,
        *,
        dtype: torch.dtype = torch.float32,
        revision: str | None = None,
        trust_remote_code: bool = False,
    ) -> HFBackbone:
        """Load a folder or hub id in the transformers layout (safetensors only), frozen and in evaluation mode."""
        options = {"revision": revision, "trust_remote_code": trust_remote_code}
        tokenizer = AutoTokenizer.from_pretrained(name, **options)
        if tokenizer.chat_template is None:
            raise Mgp5Error(f"{name} has no chat template", "add a chat_template.jinja beside its tokenizer")
        image_processor = AutoImageProcessor.from_pretrained(name, **options)
        model = AutoModelForImageTextToText.from_pretrained(name, dtype=dtype, use_safetensors=True, **options)
        return cls(model.eval().requires_grad_(False), tokenizer, image_processor)

    @property
    def core(self) -> nn.Module:
        """The transformers model, also when peft has wrapped it."""
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model

    @property
    def device(self) -> torch.device:
        return self.core.lm_head.weight.device

    def preprocess(self, pictures: list[PIL.Image.Image]) -> dict[str, Tensor]:
        return dict(self.image_processor(images=pictures, return_tensors="pt"))

    def slots(self, inputs: dict[str, Tensor]) -> list[int]:
        if "image_grid_thw" in inputs:  # patches of any resolution, merged in squares
            return (inputs["image_grid_thw"].prod(-1) // self.image_processor.merge_size**2).tolist()
        pixels, config = inputs["pixel_values"], self.core.config
        side = config.vision_config.patch_size
        patches = (pixels.shape[-2] // side) * (pixels.shape[-1] // side)
        extra = 0 if config.vision_feature_select_strategy == "default" else 1  # "full" keeps the class token
        return [patches + extra] * len(pixels)

    def encode_images(self, inputs: dict[str, Tensor]) -> list[Tensor]:
        tensors = {key: value.to(self.device) for key, value in inputs.items()}
        tensors["pixel_values"] = tensors["pixel_values"].to(self.core.dtype)
        output = self.core.get_image_features(**tensors)
        return list(output.pooler_output if isinstance(output, ModelOutput) else output)

    def embed(self, ids: Tensor, features: list[Tensor]) -> Tensor:
        embeds = self.core.get_input_embeddings()(ids)
        slots = ids == self.image_token_id  # (B, T)
        if features:
            found, expected = int(slots.sum()), sum(len(f) for f in features)
            if found != expected:
                raise ValueError(f"{found} image slots in the prompt, but pictures with {expected} features")
            embeds = embeds.masked_scatter(slots.unsqueeze(-1), torch.cat(features).to(embeds.dtype))
        return embeds

    def positions(self, ids: Tensor, grids: Tensor | None, mask: Tensor | None = None) -> Tensor:
        if hasattr(self.core.model, "get_rope_index"):  # rotary positions in time, height and width
            kinds = (ids == self.image_token_id).int()
            mask = torch.ones_like(ids) if mask is None else mask
            return self.core.model.get_rope_index(ids, kinds, image_grid_thw=grids, attention_mask=mask)[0]
        return torch.arange(ids.shape[1], device=ids.device).expand(ids.shape)

    def forward(
        self, embeds: Tensor, positions: Tensor, mask: Tensor | None = None, cache: DynamicCache | None = None
    ) -> Tensor:
        output = self.core.model.language_model(
            inputs_embeds=embeds,
            position_ids=positions,
            attention_mask=mask,
            past_key_values=cache,
            use_cache=cache is not None,
        )
        return output.last_hidden_state

    def logits(self, hidden: Tensor) -> Tensor:
        return self.core.lm_head(hidden)

    def new_cache(self) -> DynamicCache:
        return DynamicCache(config=self.core.config.get_text_config())

    def add_tokens(self, tokens: list[str]) -> list[int]:
        """Add special tokens; new rows of embedding and LM head start at the mean of the rows of known tokens.

        A vocabulary padded beyond the tokenizer keeps its size. Returns the ids, in the order of `tokens`.
        """
        known = len(self.tokenizer)
        fresh = [token for token in tokens if token not in self.tokenizer.get_added_vocab()]
        self.tokenizer.add_tokens(fresh, special_tokens=True)
        ids = self.tokenizer.convert_tokens_to_ids(tokens)
        core = self.core
        if max(ids) >= core.get_input_embeddings().weight.shape[0]:
            core.resize_token_embeddings(len(self.tokenizer), mean_resizing=False)
        if fresh:
            rows = self.tokenizer.convert_tokens_to_ids(fresh)
            for weight in {id(w): w for w in (core.get_input_embeddings().weight, core.lm_head.weight)}.values():
                with torch.no_grad():
                    weight[rows] = weight[:known].float().mean(dim=0).to(weight.dtype)
        core.requires_grad_(False)
        return ids

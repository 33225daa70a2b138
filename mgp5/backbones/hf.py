"""Any transformers AutoModelForImageTextToText as a backbone. B batch, T tokens, D width, S slots of one picture, k
deep levels of Qwen3-VL, P virtual tokens of a prefix.

Proved on LLaVA-1.5, Qwen2.5-VL, Qwen3-VL and MiniGPT-4 (BLIP-2 around a LLaMA). What differs between families lives
here: how a picture is written, how many slots it takes, where rotary positions come from, and deep features.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForImageTextToText, AutoTokenizer, Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import ModelOutput

from ..errors import Mgp5Error
from . import SideInputs
from .image_processor import load_image_processor
from .kv_cache import KVCache
from .prefix import fixed_cache, prefix_encoder, prefix_states
from .quantization import Quantize, is_quantized, keep_layout, quantization

if TYPE_CHECKING:
    import PIL.Image

    from ..memory.offload import Placement

# How a picture is written in a prompt, by the token that is repeated once per slot; others stand alone.
PICTURE_MARKS = {
    "<|image_pad|>": "<|vision_start|><|image_pad|><|vision_end|>",  # Qwen
    "<ImageHere>": "<Img><ImageHere></Img>",  # MiniGPT-4
}


class HFBackbone(nn.Module):
    """A frozen multimodal LLM of transformers, called in parts so that hidden states and the cache stay ours."""

    compiled = False  # whether tokens are decoded by compiled code
    side: SideInputs | None = None  # of the present forward
    placement: Placement | None = None  # what moves weights, see `mgp5.memory.offload`

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
        self.image_token: str = PICTURE_MARKS.get(mark, mark)
        self.prefix: nn.Module | None = None
        stops = getattr(model.generation_config, "eos_token_id", None)
        listed = stops if isinstance(stops, list) else [stops]
        self.stop_ids = frozenset(i for i in [*listed, tokenizer.eos_token_id] if i is not None)

    @classmethod
    def load(
        cls,
        name: str | Path,
        *,
        dtype: torch.dtype = torch.float32,
        quantize: Quantize = "none",
        revision: str | None = None,
    ) -> HFBackbone:
        """Load a folder or hub id in the transformers layout, frozen and in evaluation mode.

        Args:
            name: a folder, or a hub id; only safetensors weights are read, and no code.
            dtype: of the weights.
            quantize: bits of the decoder's layers.
            revision: branch, tag or commit on the hub.

        Raises:
            Mgp5Error: the tokenizer has no chat template.
            OSError, ValueError: as transformers raises them.
        """
        options: dict[str, Any] = {"revision": revision}
        tokenizer = AutoTokenizer.from_pretrained(name, **options)
        if tokenizer.chat_template is None:
            raise Mgp5Error(f"{name} has no chat template", "add a chat_template.jinja beside its tokenizer")
        image_processor = load_image_processor(name, **options)
        options |= quantization(quantize, dtype)
        model = AutoModelForImageTextToText.from_pretrained(name, dtype=dtype, use_safetensors=True, **options)
        return cls(keep_layout(model).eval().requires_grad_(False), tokenizer, image_processor)

    @property
    def core(self) -> nn.Module:
        """The transformers model, also when peft has wrapped it."""
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model

    @cached_property
    def language(self) -> nn.Module:
        """The decoder without its LM head, from embeddings to `last_hidden_state`."""
        decoder = self.core.get_decoder()
        return getattr(decoder, "model", decoder)  # BLIP-2 holds a whole causal LM

    @property
    def lm_head(self) -> nn.Module:
        """The projection from hidden states (..., D) to logits (..., V)."""
        return self.core.get_output_embeddings()

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.placement.device if self.placement else self.lm_head.weight.device

    def use(self, phase: str = "read") -> None:
        """Have the weights of a phase on the device: every method that computes with them begins so."""
        if self.placement:
            self.placement.enter(phase)

    def preprocess(self, images: list[PIL.Image.Image]) -> dict[str, Tensor]:
        """Turn N images into the tensors that `encode_images` takes; runs in data workers, needs no weights.

        Raises:
            ValueError: an image of a shape that the processor refuses.
        """
        return dict(self.image_processor(images=images, return_tensors="pt"))

    def slots(self, inputs: dict[str, Tensor]) -> list[int]:
        """Return how many token slots S each of N preprocessed images takes."""
        if "image_grid_thw" in inputs:  # patches of any resolution, merged in squares
            return (inputs["image_grid_thw"].prod(-1) // self.image_processor.merge_size**2).tolist()
        pixels, config = inputs["pixel_values"], self.core.config
        if hasattr(config, "num_query_tokens"):  # a Q-Former
            return [config.num_query_tokens] * len(pixels)
        side = config.vision_config.patch_size
        patches = (pixels.shape[-2] // side) * (pixels.shape[-1] // side)
        extra = 0 if config.vision_feature_select_strategy == "default" else 1  # "full" keeps the class token
        return [patches + extra] * len(pixels)

    def encode_images(self, inputs: dict[str, Tensor]) -> list[Tensor]:
        """Encode N preprocessed images by the vision tower and its projector: one (S, E) tensor each."""
        self.use("see")
        tensors = {key: value.to(self.device) for key, value in inputs.items()}
        tensors["pixel_values"] = tensors["pixel_values"].to(self.core.dtype)
        output = self.core.get_image_features(**tensors)
        features = output.pooler_output if isinstance(output, ModelOutput) else output
        if deep := getattr(output, "deepstack_features", None):  # Qwen3-VL, from k layers of its vision tower
            levels = [level if isinstance(level, Tensor) else torch.cat(level) for level in deep]
            return list(torch.cat([torch.cat(features), *levels], dim=-1).split([len(f) for f in features]))
        return list(features)

    def embed(self, ids: Tensor, features: list[Tensor]) -> Tensor:
        """Return the embeddings (B, T, E) of tokens (B, T), with image features in their slots, in reading order.

        Args:
            features: one (S, E) tensor for each image in `ids`; or none, and slots keep the token's embedding.

        Raises:
            ValueError: `ids` have another number of slots than the features.
        """
        self.use()
        embeds = self.language.get_input_embeddings()(ids)
        if features:
            slots = ids == self.image_token_id  # (B, T)
            found, expected = int(slots.sum()), sum(len(f) for f in features)
            if found != expected:
                raise ValueError(f"{found} image slots in the prompt, but pictures with {expected} features")
            embeds = nn.functional.pad(embeds, (0, features[0].shape[-1] - embeds.shape[-1]))  # deep: 0 for text
            given = torch.cat([f.to(embeds.dtype) for f in features])  # before: autocast on the CPU joins no fp16
            embeds = embeds.masked_scatter(slots.unsqueeze(-1), given)
        return embeds

    def positions(self, ids: Tensor, grids: Tensor | None, mask: Tensor | None = None) -> Tensor:
        """Return rotary positions of whole sequences (B, T): (B, T), or (3, B, T) in time, height and width.

        Args:
            grids: (N, 3) patches of each image in time, height and width, where the backbone has such.
            mask: (B, T), 1 for tokens, 0 for padding.
        """
        rope_index = getattr(getattr(self.core, "model", None), "get_rope_index", None)
        if rope_index is not None:  # rotary positions in time, height and width
            kinds = (ids == self.image_token_id).int()
            mask = torch.ones_like(ids) if mask is None else mask
            return rope_index(ids, kinds, image_grid_thw=grids, attention_mask=mask)[0]
        return torch.arange(ids.shape[1], device=ids.device).expand(ids.shape)

    def side_inputs(self, ids: Tensor, slots: Sequence[int], features: Tensor | None) -> SideInputs | None:
        """Say which images each token of whole sequences may attend to: those whose slots end before it.

        Args:
            ids: (B, T).
            slots: S of each of the N images, in reading order over the rows.
            features: (N, ...) what `Head.encode_images` made of them; None for none.
        """
        if features is None or not len(features):
            return None
        is_slot = ids == self.image_token_id
        before = is_slot.cumsum(1) - is_slot.long()  # (B, T) slots before each token
        ends: list[list[int]] = []  # of each row, at which number of slots each image ends
        images = iter(slots)
        for total in is_slot.sum(1).tolist():
            ends.append([])
            while (ends[-1] or [0])[-1] < total:
                ends[-1].append((ends[-1] or [0])[-1] + next(images))
        padded = features.new_zeros(len(ids), max(map(len, ends)), *features.shape[1:])
        visible, first = torch.zeros_like(ids), 0
        for row, own in enumerate(ends):
            padded[row, : len(own)] = features[first : first + len(own)]
            visible[row] = (before[row, :, None] >= torch.tensor(own, device=ids.device)).sum(-1)
            first += len(own)
        return SideInputs(padded, visible)

    def forward(
        self,
        embeds: Tensor,
        positions: Tensor,
        mask: Tensor | None = None,
        cache: Cache | None = None,
        side: SideInputs | None = None,
    ) -> Tensor:
        """Return the last hidden states (B, T, D), after the final norm, of embeddings (B, T, E).

        Args:
            positions: (B, T) or (3, B, T).
            mask: (B, T), 1 for tokens, 0 for padding; with a cache (B, 1, T, W), added to attention scores.
            cache: keys and values that the tokens attend to, and are written to.
            side: what layer hooks of a head attend to; they read it from `self.side`.
        """
        self.use()
        if side is not None or self.side is not None:
            self.side = side
        embeds, deep = embeds[..., : self.width], embeds[..., self.width :]
        options: dict[str, Any] = {"use_cache": cache is not None}
        if deep.shape[-1]:  # added to the states behind the first k layers; to those of text as zeros
            options["visual_pos_masks"] = torch.ones_like(deep[..., 0], dtype=torch.bool)
            options["deepstack_visual_embeds"] = [level.flatten(0, 1) for level in deep.split(self.width, dim=-1)]
        if self.prefix is not None and cache is None:
            cache = fixed_cache(prefix_states(self.prefix, len(embeds)))
            if mask is not None:
                mask = nn.functional.pad(mask, (cache.get_seq_length(), 0), value=1)
        output = self.language(
            inputs_embeds=embeds, position_ids=positions, attention_mask=mask, past_key_values=cache, **options
        )
        return output.last_hidden_state

    def logits(self, hidden: Tensor) -> Tensor:
        """Return logits (..., V) of hidden states (..., D)."""
        self.use()
        return self.lm_head(hidden)

    def new_cache(self, rows: int = 1) -> KVCache:
        """Return an empty key-value cache for a number of conversations; a prefix is in it already.

        Raises:
            Mgp5Error: the LLM has layers without full attention.
        """
        self.use()
        text = self.core.config.get_text_config()
        kinds = set(getattr(text, "layer_types", None) or []) - {"full_attention"}
        if kinds and (getattr(text, "sliding_window", None) or 0) < self.context_length:
            raise Mgp5Error(
                f"the LLM has layers of {', '.join(kinds)}", "expected full attention: take another --model"
            )
        states = None if self.prefix is None else prefix_states(self.prefix, 1, self.lm_head.weight.dtype)
        return KVCache(text.num_hidden_layers, rows, states)

    @property
    def capturable(self) -> bool:
        """Whether the forward of a token can be a CUDA graph: weights stay, and the host looks at no value."""
        rotary = getattr(self.core.config.get_text_config(), "rope_parameters", None)
        return not (self.placement or is_quantized(self.core) or "dynamic" in str(rotary))

    def add_prefix(self, num_tokens: int, hidden: int) -> None:
        """Prefix tuning (Li & Liang, arXiv 2101.00190): keys and values of P virtual tokens before all tokens, in every
        layer, from an MLP of hidden width `hidden`. They train in float32; positions of the tokens do not shift."""
        self.prefix = prefix_encoder(self.core.config.get_text_config(), num_tokens, hidden).to(self.device)

    def checkpointing(self, on: bool) -> None:
        """Turn gradient checkpointing of the language model on or off; it is active in training mode."""
        for layer in self.language.modules():
            if isinstance(layer, GradientCheckpointingLayer):
                layer.gradient_checkpointing = on
                layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
                layer._can_checkpoint_with_cache = True  # a prefix: it does not grow when a layer runs again

    def train(self, mode: bool = True) -> HFBackbone:
        """Only the language model changes mode: it holds what trains, and the Q-Former has dropout."""
        super().train(False)
        self.language.train(mode)
        self.training = mode
        return self

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
            for weight in {id(w): w for w in (core.get_input_embeddings().weight, self.lm_head.weight)}.values():
                with torch.no_grad():
                    weight[rows] = weight[:known].float().mean(dim=0).to(weight.dtype)
        core.requires_grad_(False)
        return ids

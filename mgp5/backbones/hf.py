"""Any transformers AutoModelForImageTextToText as a backbone.

Tested with LLaVA-1.5, Qwen2.5-VL, Qwen3-VL and MiniGPT-4 (BLIP-2 around a LLaMA). Model families differ in the text
that stands for an image, the number of slots of an image, rotary positions and DeepStack features.

Letters: B batch, T tokens, D LLM width, N images, S slots of one image, E embedding width (see `Backbone`), V
vocabulary, k DeepStack levels of Qwen3-VL.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForImageTextToText, Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import ModelOutput

from ..errors import Mgp5Error
from ..hub import any_precision
from . import SideInputs
from .kv_cache import KVCache, PrefixLayer, prefix_states
from .processors import load_image_processor, load_tokenizer
from .quantization import Quantize, is_quantized, keep_layout, quantization

if TYPE_CHECKING:
    import PIL.Image


# Image token of a tokenizer, repeated once per slot -> text of an image in a prompt; others are that text themselves.
IMAGE_MARKS = {
    "<|image_pad|>": "<|vision_start|><|image_pad|><|vision_end|>",  # Qwen
    "<ImageHere>": "<Img><ImageHere></Img>",  # MiniGPT-4
}


class HFBackbone(nn.Module):
    """A frozen multimodal LLM of transformers; it implements Backbone.

    Its parts are called one by one instead of by `generate`, because heads need hidden states and the cache. `model` is
    an AutoModelForImageTextToText, `tokenizer` has a chat template.
    """

    compiled = False
    engine = None
    side: SideInputs | None = None  # of the current forward
    compute_device: torch.device | None = None  # set where weights wait elsewhere while they are not needed

    def __init__(self, model: nn.Module, tokenizer: Any, image_processor: Any) -> None:
        super().__init__()
        self.model, self.tokenizer, self.image_processor = model, tokenizer, image_processor
        self.size: dict[str, dict[str, int]] = {}  # of images, see `limit_pixels`
        config = model.config
        text = config.get_text_config()
        self.width: int = text.hidden_size
        self.context_length: int = text.max_position_embeddings
        self.image_token_id: int = config.image_token_id
        mark = tokenizer.convert_ids_to_tokens(self.image_token_id)
        self.image_token: str = IMAGE_MARKS.get(mark, mark)
        self.prefix: nn.Module | None = None  # see `adapters.add_prefix`
        self.biases: dict[int, Callable[[], Tensor]] = {}  # of tokens: what heads add to their logits
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

        Only safetensors weights are read, and no code. `revision` is a branch, tag or commit on the hub. Raises
        Mgp5Error if the tokenizer has no chat template, OSError, ValueError and SafetensorError as transformers does.
        """
        tokenizer = load_tokenizer(name, revision=revision)
        if tokenizer.chat_template is None:
            raise Mgp5Error(f"{name} has no chat template", "add a chat_template.jinja beside its tokenizer")
        image_processor = load_image_processor(name, revision=revision)
        options = {"dtype": dtype, "use_safetensors": True, "revision": revision, **quantization(quantize, dtype)}
        model = any_precision(AutoModelForImageTextToText.from_pretrained, name, **options)
        return cls(keep_layout(model).eval().requires_grad_(False), tokenizer, image_processor)

    @property
    def core(self) -> nn.Module:
        """Return the transformers model without the wrapper of peft."""
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model

    @cached_property
    def language(self) -> nn.Module:
        """Return the decoder without its LM head, from embeddings to `last_hidden_state`."""
        decoder = self.core.get_decoder()
        return getattr(decoder, "model", decoder)  # BLIP-2 has a causal LM with its LM head here

    @property
    def lm_head(self) -> nn.Module:
        """Return the projection from hidden states (..., D) to logits (..., V)."""
        return self.core.get_output_embeddings()

    @property
    def vocabulary(self) -> int:
        """Return how many rows of the LM head are tokens; those behind them are padding (Qwen has hundreds)."""
        return max(len(self.tokenizer), *(number + 1 for number in self.tokenizer.added_tokens_decoder), 0)

    @property
    def device(self) -> torch.device:
        """Return the device of the computation, also while weights are offloaded."""
        return self.compute_device or self.lm_head.weight.device

    def preprocess(self, images: list[PIL.Image.Image]) -> dict[str, Tensor]:
        """Convert N images to the tensors that `encode_images` takes."""
        return dict(self.image_processor(images=images, return_tensors="pt", **self.size))

    def limit_pixels(self, most: int) -> None:
        """Let `preprocess` scale images down to at most so many pixels, where their slots grow with their size."""
        if hasattr(self.image_processor, "merge_size"):  # Qwen
            size = {edge: min(value, most) for edge, value in dict(self.image_processor.size).items() if value}
            self.size = {"size": size}

    def slots(self, inputs: dict[str, Tensor]) -> list[int]:
        """Return S, the number of token slots, of each of N preprocessed images."""
        if "image_grid_thw" in inputs:  # Qwen: patches at native resolution, merged in squares
            return (inputs["image_grid_thw"].prod(-1) // self.image_processor.merge_size**2).tolist()
        pixels, config = inputs["pixel_values"], self.core.config
        if hasattr(config, "num_query_tokens"):  # Q-Former
            return [config.num_query_tokens] * len(pixels)
        patch = config.vision_config.patch_size
        patches = (pixels.shape[-2] // patch) * (pixels.shape[-1] // patch)
        extra = 0 if config.vision_feature_select_strategy == "default" else 1  # "full" keeps the class token
        return [patches + extra] * len(pixels)

    def encode_images(self, inputs: dict[str, Tensor]) -> list[Tensor]:
        """Encode N preprocessed images by the vision tower and its projector to one tensor (S, E) each."""
        tensors = {key: value.to(self.device) for key, value in inputs.items()}
        tensors["pixel_values"] = tensors["pixel_values"].to(self.core.dtype)
        output = self.core.get_image_features(**tensors)
        features = output.pooler_output if isinstance(output, ModelOutput) else output
        if deep := getattr(output, "deepstack_features", None):  # Qwen3-VL: k tensors, one for each level
            levels = [level if isinstance(level, Tensor) else torch.cat(level) for level in deep]
            return list(torch.cat([torch.cat(features), *levels], dim=-1).split([len(f) for f in features]))
        return list(features)

    @property
    def vision_tower(self) -> nn.Module | None:
        """Return the vision tower, None where there is none that a head can look into."""
        parts = (self.core, getattr(self.core, "model", None))
        names = ("vision_tower", "vision_model")
        return next((getattr(part, name) for part in parts for name in names if hasattr(part, name)), None)

    @property
    def vision_width(self) -> int:
        """Return V, the width of `vision_tokens`."""
        return self.core.config.vision_config.hidden_size

    def vision_tokens(self, inputs: dict[str, Tensor]) -> Tensor:
        """Return all tokens (N, S, V) that the vision tower's layers give for N preprocessed images, before the norm
        and the projector. Raises Mgp5Error if this LLM's tower does not work on images of one size."""
        tower = self.vision_tower
        if tower is None or "image_grid_thw" in inputs:
            case = f"the vision tower of {self.core.config.model_type} gives no tokens of its own"
            raise Mgp5Error(case, "take a LLaVA or a BLIP-2")
        pixels = inputs["pixel_values"].to(self.device, self.core.dtype)
        if hasattr(tower, "encoder") and not hasattr(tower, "pre_layrnorm"):  # BLIP-2 has a norm over all of them
            return tower.encoder(inputs_embeds=tower.embeddings(pixels)).last_hidden_state
        return tower(pixel_values=pixels).last_hidden_state  # CLIP's norm is for the pooled token alone

    def embed(self, ids: Tensor, features: list[Tensor]) -> Tensor:
        """Return the embeddings (B, T, E) of tokens (B, T), with image features, each (S, E), in their slots in order.

        Without features, slots keep the image token's embedding. Raises ValueError if there are more or fewer slots.
        """
        embeds = self.language.get_input_embeddings()(ids)
        if features:
            slots = ids == self.image_token_id  # (B, T)
            num_slots, expected = int(slots.sum()), sum(len(f) for f in features)
            if num_slots != expected:
                raise ValueError(f"{num_slots} image slots in the prompt, but images with {expected} features")
            embeds = nn.functional.pad(embeds, (0, features[0].shape[-1] - embeds.shape[-1]))  # DeepStack: 0 for text
            # Converted before `cat`, which autocast on the CPU does not support for fp16.
            source = torch.cat([f.to(embeds.dtype) for f in features])
            embeds = embeds.masked_scatter(slots.unsqueeze(-1), source)
        return embeds

    def positions(self, ids: Tensor, grids: Tensor | None, mask: Tensor | None = None) -> Tensor:
        """Return rotary position ids of complete sequences (B, T): (B, T), or for Qwen (3, B, T) in time, height and
        width; `grids` (N, 3) are the patches of each image in these, and `mask` (B, T) is 1 for tokens, 0 for padding.
        """
        rope_index = getattr(getattr(self.core, "model", None), "get_rope_index", None)
        if rope_index is not None:
            token_types = (ids == self.image_token_id).int()
            mask = torch.ones_like(ids) if mask is None else mask
            return rope_index(ids, token_types, image_grid_thw=grids, attention_mask=mask)[0]
        return torch.arange(ids.shape[1], device=ids.device).expand(ids.shape)

    def side_inputs(
        self, ids: Tensor, slots: Sequence[int], features: Tensor | None, begins: Tensor | None = None
    ) -> SideInputs | None:
        """Return the side inputs of complete sequences (B, T): a token may attend to images whose slots have begun.

        `slots` holds S of each of the N images in reading order over the rows, `features` (N, ...) their
        `ImageContext.side`, or None, and `begins` (B, T) where the document of each token begins, in packed rows.
        """
        if features is None or not len(features):
            return None
        is_slot = ids == self.image_token_id
        row_ends = is_slot.sum(1).cumsum(0)  # (B,), slots of the batch up to the end of each row
        image_ends = torch.tensor(slots, device=ids.device).cumsum(0)  # (N,), and of each image
        counts = torch.bincount(torch.searchsorted(row_ends, image_ends), minlength=len(ids))  # (B,), images of a row
        image_starts = image_ends - torch.tensor(slots, device=ids.device)  # (N,), slots before each image
        so_far = is_slot.flatten().cumsum(0).view(ids.shape)  # (B, T), slots up to each token
        visible = torch.searchsorted(image_starts, so_far) - (counts.cumsum(0) - counts)[:, None]
        first = None if begins is None else (visible - is_slot.long()).gather(1, begins.clamp(max=ids.shape[1] - 1))
        return SideInputs(pad_sequence(features.split(counts.tolist()), batch_first=True), visible, first)

    def forward(
        self,
        embeds: Tensor,  # (B, T, E)
        positions: Tensor,  # (B, T) or (3, B, T)
        mask: Tensor | None = None,  # (B, T) of 1 and 0, or (B, 1, T, attended slots), which is added to the scores
        cache: Cache | None = None,
        side: SideInputs | None = None,
    ) -> Tensor:
        """Return the last hidden states (B, T, D), after the final norm; a cache is read and written.

        Layer hooks of a head read `side` from `self.side`.
        """
        if side is not None or self.side is not None:
            self.side = side
        embeds, deep = embeds[..., : self.width], embeds[..., self.width :]
        options: dict[str, Any] = {"use_cache": cache is not None}
        if deep.shape[-1]:  # added to the outputs of the first k layers; zeros for text
            options["visual_pos_masks"] = torch.ones_like(deep[..., 0], dtype=torch.bool)
            options["deepstack_visual_embeds"] = [level.flatten(0, 1) for level in deep.split(self.width, dim=-1)]
        if self.prefix is not None and cache is None:
            cache = Cache(layers=[PrefixLayer(*pair) for pair in prefix_states(self.prefix, len(embeds))])
            if mask is not None:
                mask = nn.functional.pad(mask, (cache.get_seq_length(), 0), value=int(mask.dim() == 2))
        output = self.language(
            inputs_embeds=embeds, position_ids=positions, attention_mask=mask, past_key_values=cache, **options
        )
        return output.last_hidden_state

    def add_after_attention(self, layer: int, read: Callable[[Tensor], Tensor]) -> None:
        """Let a layer add `read` of its states (B, T, D) to them, between self-attention and MLP.

        It is added to the output of self-attention, by hooks, and so to the residual stream. Raises Mgp5Error for a
        layer that is not built like LLaMA's.
        """
        layer, before = self.language.layers[layer], {}
        if not (hasattr(layer, "input_layernorm") and hasattr(layer, "self_attn")):
            case = f"the LLM has a {type(layer).__name__} without input_layernorm and self_attn"
            raise Mgp5Error(case, "take one with a LLaMA, Vicuna, Mistral or Qwen")

        def keep(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            before["states"] = inputs[0]  # the residual stream, which the norm before self-attention gets

        def add(_: nn.Module, __: Any, output: tuple[Any, ...]) -> tuple[Any, ...]:
            return output[0] + read(before.pop("states") + output[0]), *output[1:]

        layer.input_layernorm.register_forward_pre_hook(keep)
        layer.self_attn.register_forward_hook(add)

    def logits(self, hidden: Tensor) -> Tensor:
        """Return logits (..., V) of hidden states (..., D)."""
        logits = self.lm_head(hidden)
        for token, bias in self.biases.items():
            logits[..., token] += bias()
        return logits

    def new_cache(self, rows: int = 1) -> KVCache:
        """Return an empty key-value cache for a number of conversations; a trained prefix is in it already.

        Raises Mgp5Error if the LLM has sliding-window or linear attention.
        """
        text = self.core.config.get_text_config()
        if kinds := self._other_attention:
            case = f"the LLM has layers of {', '.join(kinds)}"
            raise Mgp5Error(case, "expected full attention: take another --model")
        states = None if self.prefix is None else prefix_states(self.prefix, 1, self.lm_head.weight.dtype)
        return KVCache(text.num_hidden_layers, rows, states)

    @property
    def _other_attention(self) -> set[str]:
        """Return the kinds of layers that do not attend to all tokens before."""
        text = self.core.config.get_text_config()
        kinds = set(getattr(text, "layer_types", None) or []) - {"full_attention"}
        return kinds if (getattr(text, "sliding_window", None) or 0) < self.context_length else set()

    @property
    def packable(self) -> bool:
        """Return whether a mask keeps samples apart that are in one row."""
        return not self._other_attention

    @property
    def capturable(self) -> bool:
        """Return whether the forward of one token can be a CUDA graph: nothing is offloaded or read by the host."""
        rotary = getattr(self.core.config.get_text_config(), "rope_parameters", None)
        adapted = self.model is not self.core  # rows of adapters that are not merged are found by the host
        by_length = any(kind in str(rotary) for kind in ("dynamic", "longrope"))
        return not (adapted or self.compute_device or is_quantized(self.core) or by_length)

    def checkpointing(self, on: bool) -> None:
        """Turn gradient checkpointing of the language model on or off; it applies in training mode."""
        for layer in self.language.modules():
            if isinstance(layer, GradientCheckpointingLayer):
                layer.gradient_checkpointing = on
                layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
                layer._can_checkpoint_with_cache = True  # the cache of a prefix does not grow when a layer reruns

    def train(self, mode: bool = True) -> HFBackbone:
        """Set the mode of the language model only: nothing else trains, and the Q-Former has dropout."""
        super().train(False)
        self.language.train(mode)
        self.training = mode
        return self

    def add_tokens(self, tokens: list[str]) -> list[int]:
        """Add special tokens; their rows of embedding and LM head start at the mean of all other rows.

        Tokens that the vocabulary has already keep their rows. A vocabulary that is padded beyond the tokenizer keeps
        its size. Returns the ids, in the order of `tokens`.
        """
        known = len(self.tokenizer)
        fresh = [token for token in tokens if token not in self.tokenizer.get_added_vocab()]
        self.tokenizer.add_tokens(fresh, special_tokens=True)
        ids = self.tokenizer.convert_tokens_to_ids(tokens)
        core = self.core
        if max(ids) >= core.get_input_embeddings().weight.shape[0]:
            core.resize_token_embeddings(len(self.tokenizer), mean_resizing=False)
        if rows := [row for row in self.tokenizer.convert_tokens_to_ids(fresh) if row >= known]:
            for weight in {id(w): w for w in (core.get_input_embeddings().weight, self.lm_head.weight)}.values():
                with torch.no_grad():
                    weight[rows] = weight[:known].float().mean(dim=0).to(weight.dtype)
        core.requires_grad_(False)
        return ids

"""Trainable weights of the LLM by peft: rows of the head's new tokens, LoRA or a prefix; and merging them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from .quantization import is_quantized

if TYPE_CHECKING:
    from torch import Tensor

    from ..config import LoraConfig, PrefixConfig
    from .hf import HFBackbone


def adapt(
    backbone: HFBackbone, rows: Sequence[int], lora: LoraConfig | None = None, prefix: PrefixConfig | None = None
) -> None:
    """Add trainable weights to a frozen LLM: rows of embedding and LM head, and LoRA or a prefix.
    `rows` are token ids, maybe none. LoRA: Hu et al., arXiv 2106.09685. Prefix: Li & Liang, arXiv 2101.00190."""
    from peft import LoraConfig as PeftLora
    from peft import TrainableTokensConfig, get_peft_model

    names, rows = ["embed_tokens"], list(rows)
    if backbone.lm_head.weight is not backbone.core.get_input_embeddings().weight:
        names.append("lm_head")  # with tied embeddings one set of rows serves both
    if lora is None:
        adapter = TrainableTokensConfig(target_modules=names, token_indices=rows)
    else:
        adapter = PeftLora(
            r=lora.rank,
            lora_alpha=lora.alpha,
            lora_dropout=lora.dropout,
            # Only the language model: vision towers have projections of the same names.
            target_modules=rf".*language_model.*\.({'|'.join(lora.targets)})",
            trainable_token_indices=dict.fromkeys(names, rows),
        )
    backbone.model = get_peft_model(backbone.core, adapter)
    if prefix:
        add_prefix(backbone, prefix.tokens, prefix.hidden)


def merge(backbone: HFBackbone, keep_lora: bool) -> None:
    """Merge trained rows and LoRA into the LLM; `keep_lora` leaves LoRA beside quantized weights, which would round
    most of it away."""
    if backbone.model is backbone.core:
        return
    if keep_lora and is_quantized(backbone.core):
        merge_rows(backbone)
    else:
        backbone.model = backbone.model.merge_and_unload()


def merge_rows(backbone: HFBackbone) -> None:
    """Merge trained rows into embedding and LM head, which are never quantized."""
    from peft.tuners.trainable_tokens.layer import TrainableTokensLayer

    for module in backbone.model.modules():
        if isinstance(module, TrainableTokensLayer) and not module.merged:
            module.merge()


def take_off(backbone: HFBackbone) -> dict[str, Tensor]:
    """Merge trained rows into the LLM, take LoRA or the prefix off it, and return their tensors for `put_on`."""
    from peft import get_peft_model_state_dict

    if backbone.model is backbone.core:
        return {}
    state = get_peft_model_state_dict(backbone.model, save_embedding_layers=False)
    tensors = {name: value.detach().clone() for name, value in state.items() if "lora_" in name}
    if backbone.prefix is not None:
        tensors, backbone.prefix = dict(backbone.prefix.state_dict()), None
    merge_rows(backbone)
    backbone.model = backbone.model.unload()
    return tensors


def put_on(backbone: HFBackbone, tensors: dict[str, Tensor], scale: float) -> None:
    """Begin a fresh LoRA of at least the same rank, or a prefix of the same shape, with what `take_off` returned;
    `scale` is that of the old LoRA (alpha / rank) in units of the new one's. The rest of the new rank adds nothing."""
    if backbone.prefix is not None:
        backbone.prefix.load_state_dict(tensors)
        return
    weights = dict(backbone.model.named_parameters())
    for name, value in tensors.items():
        weight = weights[name.removesuffix("weight") + "default.weight"].detach()
        if "lora_A" in name:
            weight[: len(value)] = value
        else:
            weight[:, : value.shape[1]] = value * scale


def add_prefix(backbone: HFBackbone, num_tokens: int, hidden: int) -> None:
    """Add a trainable prefix in float32 (Li & Liang, arXiv 2101.00190, section 4.3): embeddings of virtual tokens, and
    an MLP of width `hidden` to keys and values of all layers. Positions of the tokens do not shift."""
    from peft import PrefixEncoder, PrefixTuningConfig

    text = backbone.core.config.get_text_config()
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    config = PrefixTuningConfig(
        num_virtual_tokens=num_tokens,
        num_layers=text.num_hidden_layers,
        num_attention_heads=text.num_key_value_heads,
        token_dim=text.num_key_value_heads * width,
        encoder_hidden_size=hidden,
        prefix_projection=True,
    )
    encoder = PrefixEncoder(config)
    encoder.shape = (num_tokens, 2 * config.num_layers, config.num_attention_heads, width)
    backbone.prefix = encoder.to(backbone.device)

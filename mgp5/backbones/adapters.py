"""Adapters of the LLM by peft: rows of the head's new tokens, LoRA or a prefix; and merging them into the weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from .quantization import is_quantized, merge_rows

if TYPE_CHECKING:
    from ..config import LoraConfig, PrefixConfig
    from .hf import HFBackbone


def adapt(
    backbone: HFBackbone, rows: Sequence[int], lora: LoraConfig | None = None, prefix: PrefixConfig | None = None
) -> None:
    """Add trainable weights to a frozen LLM: rows of embedding and LM head, and LoRA or a prefix.

    LoRA: Hu et al., arXiv 2106.09685. Prefix tuning: Li & Liang, arXiv 2101.00190.

    Args:
        backbone: changed in place.
        rows: token ids whose rows train; may be empty.
        lora, prefix: at most one of them.
    """
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
        backbone.add_prefix(prefix.tokens, prefix.hidden)


def merge(backbone: HFBackbone, keep_lora: bool) -> None:
    """Merge trained rows and LoRA into the weights of the LLM.

    Args:
        backbone: changed in place.
        keep_lora: keep LoRA as separate layers if the weights are quantized: merging would round most of it away.
    """
    if backbone.model is backbone.core:
        return
    if keep_lora and is_quantized(backbone.core):
        merge_rows(backbone.model)
    else:
        backbone.model = backbone.model.merge_and_unload()

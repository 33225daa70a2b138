"""A frozen LLM in 4 or 8 bits (extra `quant`): which layers, and what may be folded into them."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from ..errors import Mgp5Error

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig

Quantize = Literal["none", "4bit", "8bit"]
# Only the decoder's layers: embeddings and LM head have rows that train, and vision towers lose most by it.
KEEP = ["lm_head", r"(?!.*language_model\.).*"]


def quantization(kind: Quantize, dtype: torch.dtype = torch.bfloat16) -> dict[str, BitsAndBytesConfig]:
    """Arguments for `from_pretrained`: NF4 with doubly quantised scales (Dettmers et al., arXiv 2305.14314), or
    LLM.int8() (arXiv 2208.07339).

    Args:
        dtype: in which 4-bit layers compute; float32 computes in bfloat16 all the same.

    Raises:
        Mgp5Error: bitsandbytes is not installed.
    """
    if kind == "none":
        return {}
    if find_spec("bitsandbytes") is None:
        raise Mgp5Error(f"quantize={kind} needs bitsandbytes", "pip install 'mgp5[quant]'", usage=True)
    from transformers import BitsAndBytesConfig

    four = {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": torch.bfloat16 if dtype == torch.float32 else dtype,
    }
    own: dict[str, Any] = four if kind == "4bit" else {"load_in_8bit": True}
    return {"quantization_config": BitsAndBytesConfig(llm_int8_skip_modules=KEEP, **own)}


def keep_layout(model: nn.Module) -> nn.Module:
    """On some CPUs bitsandbytes repacks 4-bit weights at the first inference, and then no gradient passes: not ours."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


def is_quantized(model: nn.Module) -> bool:
    """Whether transformers has loaded this model with quantised layers."""
    return getattr(model, "is_quantized", False)


def merge_rows(model: nn.Module) -> None:
    """Fold trained rows of embedding and LM head in, and leave LoRA beside its layers: to fold it into weights of few
    bits would round most of it away."""
    from peft.tuners.trainable_tokens.layer import TrainableTokensLayer

    for module in model.modules():
        if isinstance(module, TrainableTokensLayer) and not module.merged:
            module.merge()

"""Quantization (extra `quant`): of a frozen LLM while it is loaded, by bitsandbytes to train and to generate, by
torchao to train; of the weights of a merged LLM and a denoiser by torchao, to generate."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from ..errors import Mgp5Error
from ..options import Quantize

TORCHAO = ("int8", "fp8")
# Not quantized while loaded: embedding and LM head, which have rows that train, and vision towers, which lose most
# quality.
KEEP = [r".*lm_head", r"(?!.*language_model\.).*"]


def quantization(kind: Quantize, dtype: torch.dtype = torch.bfloat16) -> dict[str, Any]:
    """Return arguments for `from_pretrained` that quantize the decoder's layers.

    "4bit" is NF4 with double quantization (Dettmers et al., arXiv 2305.14314), which computes in `dtype`, bfloat16 for
    float32. "8bit" is LLM.int8() (arXiv 2208.07339). The others are those of `quantize_weights`. Raises Mgp5Error if
    the library is not installed.
    """
    check_quantization(kind)
    if kind == "none":
        return {}
    from transformers import BitsAndBytesConfig, TorchAoConfig

    if kind in TORCHAO:
        return {"quantization_config": TorchAoConfig(_weight_only(kind), modules_to_not_convert=KEEP)}
    nf4 = {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": torch.bfloat16 if dtype == torch.float32 else dtype,
    }
    options = nf4 if kind == "4bit" else {"load_in_8bit": True}
    return {"quantization_config": BitsAndBytesConfig(llm_int8_skip_modules=KEEP, **options)}


def check_quantization(kind: Quantize) -> None:
    """Raise Mgp5Error where the library that quantizes is not installed."""
    library = "torchao" if kind in TORCHAO else "bitsandbytes"
    if kind != "none" and find_spec(library) is None:
        raise Mgp5Error(f"quantize={kind} needs {library}", "pip install 'mgp5[quant]'", usage=True)


def quantize_weights(modules: Iterable[nn.Module], kind: Quantize) -> None:
    """Replace the weights of linear layers by int8 or fp8 (e4m3) with a scale for each row; they compute in the dtype
    that they had, and gradients pass them. Raises Mgp5Error without torchao.

    Layers unpack their weights when they are called: `--backend compile` fuses that into the product.
    """
    check_quantization(kind)
    from torchao.quantization import quantize_

    for module in modules:
        quantize_(module, _weight_only(kind))


def _weight_only(kind: Quantize) -> Any:
    from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig

    return {"int8": Int8WeightOnlyConfig, "fp8": Float8WeightOnlyConfig}[kind]()


def keep_layout(model: nn.Module) -> nn.Module:
    """Stop bitsandbytes from repacking 4-bit weights at the first inference on some CPUs, which blocks gradients."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


def is_quantized(model: nn.Module) -> bool:
    """Return whether transformers loaded this model with quantized layers."""
    return getattr(model, "is_quantized", False)

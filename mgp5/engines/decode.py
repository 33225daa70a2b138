"""Decoding by fused kernels: the forward of a few tokens of a LLaMA-like LLM over its static cache, and its LM head.

Letters: b rows of the cache, T new tokens of each, R = b T, D LLM width, V vocabulary, L layers.
"""

from __future__ import annotations

from copy import copy
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from ..backbones.kv_cache import KVCache
from ..kernels import registry as kernels

if TYPE_CHECKING:
    from ..backbones import Backbone

# Decoders of transformers whose layers are those of LLaMA, with biases or norms of heads (Qwen) or without.
LANGUAGES = ("LlamaModel", "MistralModel", "Qwen2Model", "Qwen2_5_VLTextModel", "Qwen3Model", "Qwen3VLTextModel")
OPERATIONS = ("row_norm", "row_linear", "rotary_cache", "token_attention")
REFERENCES = SimpleNamespace(**{name: kernels.implementations(name)[-1].load() for name in OPERATIONS})
NEAR = 0.01  # relative error that kernels may have here; of bfloat16, 4 times its precision
SLOTS = 1024  # that they are tried with, and a quarter of them


class Projection(NamedTuple):
    """The weight (N, K) and the bias (N), or None, of one linear layer or of several that are joined."""

    weight: Tensor
    bias: Tensor | None


class Layer(NamedTuple):
    """What a decoder layer computes with."""

    first_norm: Tensor
    qkv: Projection
    head_gains: tuple[Tensor, ...]  # of queries and keys, or none
    output: Projection
    second_norm: Tensor
    gate_up: Projection
    down: Projection


class FusedDecode:
    """Runs the forward of up to `most` tokens as the backbone does, and its logits, over the backbone's weights.

    `refusal` says for which LLMs. Joined weights take the place of the LLM's own, which become views of them.
    """

    most = 16  # rows of one tile of a product with several

    def __init__(self, backbone: Backbone, ops: SimpleNamespace) -> None:
        language = backbone.language
        attention = language.layers[0].self_attn
        self.ops, self.rotary, self.gain = ops, language.rotary_emb, language.norm.weight
        self.width, self.eps, self.scale = attention.head_dim, language.norm.variance_epsilon, attention.scaling
        self.layers = [_layer(layer) for layer in language.layers]
        self.head = Projection(backbone.lm_head.weight, backbone.lm_head.bias)
        self.groups = attention.k_proj.out_features // self.width
        self.faults: dict[int, str] = {}  # of one token, and of several, where they were tried

    def takes(self, tokens: int) -> bool:
        """Return whether it runs forwards of so many tokens: not of too many, nor where its kernels err (see `fault`),
        which is tried when one token, or several, are first asked for."""
        kind, weight = min(tokens, 2), self.head.weight
        if kind not in self.faults:
            self.faults[kind] = fault(self, kind, weight.device, weight.dtype)
        return tokens <= self.most and not self.faults[kind]

    def __call__(
        self, embeds: Tensor, positions: Tensor, mask: Tensor | None, cache: KVCache, side: None = None
    ) -> Tensor:  # (b, T, D)
        """Return the last hidden states of new tokens (b, T, D) at positions (b, T) or (3, b, T), after the final norm;
        each sees the slots of its row up to its own, whatever the mask is."""
        cos, sin = (part.flatten(0, 1) for part in self.rotary(embeds, positions))
        return self.states(embeds.flatten(0, 1).contiguous(), cos, sin, cache).view(embeds.shape)

    def states(self, x: Tensor, cos: Tensor, sin: Tensor, cache: KVCache) -> Tensor:  # (R, D)
        """Return the last hidden states of tokens (R, D) with the rotary embeddings of their positions, both (R, width
        of a head), at the slots (b, T) of `cache.index`."""
        ops, index, eps = self.ops, cache.index, self.eps
        rows, slots = index.rows[:, None].expand(index.slots.shape).flatten(), index.slots.flatten()
        for layer, kept in zip(self.layers, cache.layers, strict=True):
            if not kept.is_initialized:
                kept.lazy_initialization(*[x.new_empty(1, self.groups, 1, self.width)] * 2)
            qkv = ops.row_linear(x, *layer.qkv, layer.first_norm, None, eps)
            gains = (*layer.head_gains, eps) if layer.head_gains else ()
            query = ops.rotary_cache(qkv, cos, sin, kept.keys, kept.values, rows, slots, *gains)
            out = ops.token_attention(query, kept.keys, kept.values, rows, slots, index.width, self.scale)
            x = ops.row_linear(out, *layer.output, None, x)
            out = ops.row_linear(x, *layer.gate_up, layer.second_norm, None, eps, True)
            x = ops.row_linear(out, *layer.down, None, x)
        return ops.row_norm(x, self.gain, eps)

    def logits(self, hidden: Tensor) -> Tensor:  # (r, D) -> (r, V)
        """Return the logits of hidden states."""
        return self.ops.row_linear(hidden.contiguous(), *self.head)


def fused_decode(backbone: Backbone) -> FusedDecode | None:
    """Return what decodes by fused kernels; None on a CPU, and where there is a reason as `why_not` returns."""
    device = backbone.device
    if device.type != "cuda" or refusal(backbone, device, dtype := backbone.lm_head.weight.dtype):
        return None
    engine = FusedDecode(backbone, _kernels(device, dtype))
    return engine if engine.takes(1) else None


def why_not(backbone: Backbone, device: torch.device, dtype: torch.dtype) -> str:
    """Return `refusal`, or how kernels err on a device with the shapes of an LLM that may have no weights; else ""."""
    if reason := refusal(backbone, device, dtype):
        return reason
    engine = FusedDecode(backbone, _kernels(device, dtype))
    return fault(engine, 1, device, dtype) or fault(engine, 2, device, dtype)


def refusal(backbone: Backbone, device: torch.device, dtype: torch.dtype) -> str:
    """Return why fused kernels are not for an LLM, with weights of a dtype on a device; "" where they are.

    Only what is known to be built like LLaMA is taken; nothing is computed but a rotary embedding.
    """
    if why := unknown(backbone):
        return why
    layer = backbone.language.layers[0]
    widths = {"row_norm": backbone.width, "row_linear": backbone.width}
    for operation in OPERATIONS:
        choice = kernels.select_kernel(operation, device, dtype, widths.get(operation, layer.self_attn.head_dim))
        if choice.implementation != "triton":
            return f"{operation}: {choice.why}"
    weights = [*backbone.language.layers.parameters(), backbone.lm_head.weight]
    return "" if {weight.dtype for weight in weights} == {dtype} else f"its weights are not all {dtype}"


def unknown(backbone: Backbone) -> str:
    """Return what of an LLM is not as in LLaMA, "" if all is."""
    language = backbone.language
    if (name := type(language).__name__) not in LANGUAGES:
        return f"{name} is none of {', '.join(LANGUAGES)}"
    if not backbone.capturable:
        return "the LLM is quantized, offloaded, has an adapter beside it, or positions that the host looks at"
    if any(module._forward_hooks or module._forward_pre_hooks for module in (*language.modules(), backbone.lm_head)):
        return "layers of the LLM have hooks"
    if backbone.biases:
        return "the head adds to logits"
    linears = [m for layer in language.layers for part in (layer.self_attn, layer.mlp) for m in part.children()]
    linears = [m for m in linears if hasattr(m, "weight") and not type(m).__name__.endswith("RMSNorm")]
    if any(type(m) is not nn.Linear or type(m.weight.data) is not Tensor for m in (*linears, backbone.lm_head)):
        return "the LLM has other layers than nn.Linear with plain weights"
    config, attention = language.config, language.layers[0].self_attn
    if config.hidden_act != "silu" or len(linears) != 7 * len(language.layers):
        return f"the LLM has the activation {config.hidden_act}, or other projections than LLaMA"
    axes = (3,) if "mrope_section" in (config.rope_parameters or {}) else ()
    weight = backbone.lm_head.weight
    cos, _ = language.rotary_emb(weight[None, :1], torch.zeros(*axes, 1, 1, dtype=torch.long, device=weight.device))
    expected = (1, 1, attention.head_dim)
    return "" if cos.shape == expected else f"a rotary embedding of shape {tuple(cos.shape)}, expected {expected}"


def map_in_half(head: Any, backbone: Backbone) -> None:
    """Let the mapper of a MiniGPT-5 head run in bfloat16 where an LLM on a GPU does. Images stay within 1 of 255 in the
    mean, see tests/test_fused_decode.py."""
    half = backbone.device.type == "cuda" and backbone.lm_head.weight.dtype == torch.bfloat16
    if half and backbone.capturable and hasattr(head, "mapper"):
        head.mapper.to(torch.bfloat16)


def _kernels(device: torch.device, dtype: torch.dtype) -> SimpleNamespace:
    return SimpleNamespace(**{name: kernels.select_kernel(name, device, dtype).function for name in OPERATIONS})


@torch.inference_mode()
def fault(engine: FusedDecode, rows: int, device: torch.device, dtype: torch.dtype) -> str:
    """Return how the first layer and the LM head err by kernels for a token of each of some rows, behind few tokens and
    behind many, beside the operations' references; "" if they do not. Weights without values (meta) are drawn."""
    rng = torch.Generator(device).manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng, device=device, dtype=dtype)

    def real(weight: Tensor) -> Tensor:
        return draw(*weight.shape) / weight[0].numel() ** 0.5 if weight.is_meta else weight

    def run(ops: SimpleNamespace) -> list[Tensor]:
        one, cache, results = copy(engine), KVCache(1, rows), []
        noted = lambda operation: lambda *inputs: results.append(operation(*inputs)) or results[-1]  # noqa: E731
        one.ops = SimpleNamespace(**{name: noted(operation) for name, operation in vars(ops).items()})
        one.layers, one.head, one.gain = [layer], head, gain
        kept, places = cache.layers[0], torch.arange(rows, device=device)
        (kept.keys, kept.values), kept.is_initialized, cache.index.capacity = cached.clone(), True, SLOTS
        for width in (SLOTS // 4, SLOTS):
            cache.index.at(places, width - 3 - places[:, None], width, True)
            one.logits(one.states(x, *angles, cache))
        return [*results, kept.keys - cached[0], kept.values - cached[1]]

    try:
        layer, head, gain = tree_map_only(Tensor, real, (engine.layers[0], engine.head, engine.gain))
        x, angles = draw(rows, len(gain)), draw(2, rows, engine.width)
        cached = draw(2, rows, engine.groups, SLOTS, engine.width)
        pairs = zip(run(engine.ops), run(REFERENCES), strict=True)
        errors = [((found - wanted).float().norm() / wanted.float().norm()).item() for found, wanted in pairs]
    except Exception as error:  # of a compiler, a driver, of memory: whatever it is, these kernels would not run
        return f"kernels for {rows} tokens fail ({' '.join(str(error).split())[:160] or type(error).__name__})"
    wrong = [error for error in errors if not error < max(NEAR, 4 * torch.finfo(dtype).eps)]
    return f"kernels for {rows} tokens err by {wrong[0]:.2g} beside PyTorch" if wrong else ""


def _layer(layer: nn.Module) -> Layer:
    attention, mlp = layer.self_attn, layer.mlp
    norms = [getattr(attention, name, None) for name in ("q_norm", "k_norm")]
    return Layer(
        layer.input_layernorm.weight,
        joined(attention.q_proj, attention.k_proj, attention.v_proj),
        tuple(norm.weight for norm in norms if norm is not None),
        Projection(attention.o_proj.weight, attention.o_proj.bias),
        layer.post_attention_layernorm.weight,
        joined(mlp.gate_proj, mlp.up_proj),
        Projection(mlp.down_proj.weight, mlp.down_proj.bias),
    )


def joined(*linears: nn.Linear) -> Projection:
    """Join linear layers of one input; their weights and biases become views of the result, so that no copy is kept."""
    parts = []
    with torch.inference_mode(False), torch.no_grad():
        for tensors in ([linear.weight for linear in linears], [linear.bias for linear in linears]):
            if tensors[0] is None:
                parts.append(None)
                continue
            parts.append(torch.cat(tensors))
            for tensor, view in zip(tensors, parts[-1].split([len(each) for each in tensors]), strict=True):
                tensor.data = view
    return Projection(*parts)

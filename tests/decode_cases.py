"""Kernels of decoding against their references, as in kernel_cases.py, and a whole LLM by them."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from kernel_cases import DEVICE, TOLERANCES, assert_equals, draw, dtypes
from mgp5.kernels import registry
from mgp5.kernels import row_linear as linear
from mgp5.kernels import token_attention as attention
from test_fused_decode import states
from test_fused_decode import tiny as tiny_language

from mgp5.engines.decode import OPERATIONS, FusedDecode


@dtypes
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(
    ("rows", "width", "outputs"),
    [(1, 1, 1), (1, 70, 9), (2, 64, 32), (8, 37, 19), (9, 300, 5), (17, 16, 3)],
)
def test_row_linear(rows, width, outputs, gated, dtype, monkeypatch):
    monkeypatch.setattr(linear, "TILES", {8: (4, 32), 2**31: (4, 64)})  # several tiles, of either kind
    pair = linear.row_linear, linear.row_linear_reference
    weight = draw(2 * outputs if gated else outputs, width, dtype=dtype) / width**0.5
    x, gain, bias = draw(rows, width, dtype=dtype), draw(width, dtype=dtype, mean=1.0), draw(len(weight), dtype=dtype)
    residual = draw(rows, outputs, dtype=dtype, seed=1)
    assert_equals(*pair, x, weight, gated=gated)
    near = 2 * TOLERANCES[dtype] if rows > 1 else 1e-5  # several rows are rounded behind their norm
    assert_equals(*pair, x, weight, bias, gain, residual, 1e-5, gated=gated, atol=4 * near)
    assert_equals(linear.row_norm, linear.row_norm_reference, x, gain, 1e-5)


@dtypes
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize(("heads", "groups", "width"), [(1, 1, 2), (4, 4, 24), (6, 2, 64)])
def test_rotary_cache(heads, groups, width, normed, dtype):
    """Tokens of different rows, and two of the same; other slots keep what they had."""
    qkv, (cos, sin) = draw(4, (heads + 2 * groups) * width, dtype=dtype), draw(2, 4, width, dtype=dtype)
    cache, rows, slots = draw(2, 3, groups, 5, width, dtype=dtype), [2, 0, 0, 1], [4, 1, 2, 0]
    gains = (*draw(2, width, dtype=dtype, mean=1.0), 1e-5) if normed else ()

    def run(function, *tensors):
        qkv, cos, sin, keys, values, *gains = (x.clone() if isinstance(x, torch.Tensor) else x for x in tensors)
        places = (torch.tensor(x, device=DEVICE) for x in (rows, slots))
        return function(qkv, cos, sin, keys, values, *places, *gains), keys, values

    pair = attention.rotary_cache, attention.rotary_cache_reference
    assert_equals(*(partial(run, function) for function in pair), qkv, cos, sin, *cache, *gains)


@dtypes
@pytest.mark.parametrize(("heads", "groups", "width"), [(1, 1, 2), (4, 4, 24), (6, 2, 64)])
@pytest.mark.parametrize("slots", [[0, 0, 8, 5], [99, 3, 40, 15]])  # of one tile, and of several parts
def test_token_attention(heads, groups, width, slots, dtype, monkeypatch):
    for name, size in (("BLOCK", 16), ("PART", 16), ("PARTS", 3)):
        monkeypatch.setattr(attention, name, size)
    query, cache = draw(4, heads, width, dtype=dtype), draw(2, 3, groups, 120, width, dtype=dtype)
    places = (torch.tensor(x, device=DEVICE) for x in ([2, 0, 0, 1], slots))
    pair = attention.token_attention, attention.token_attention_reference
    assert_equals(*pair, query, *cache, *places, width=max(slots) + 1, scale=width**-0.5)


@pytest.mark.parametrize(
    "name", ["Llama-grouped", *(pytest.param(name, marks=pytest.mark.slow) for name in ("Llama-biased", "Qwen3"))]
)
def test_decoding_in_place(name, monkeypatch):
    backbone = tiny_language(name, device=DEVICE)
    cases = ([3], 1), ([4, 1], 2)
    expected = [states(backbone, *case) for case in cases]
    kernels = {name: registry.implementations(name)[0].load() for name in OPERATIONS}
    engine = FusedDecode(backbone, SimpleNamespace(**kernels))
    monkeypatch.setattr("mgp5.engines.decode.SLOTS", 64)
    assert engine.takes(1) and engine.takes(2), engine.faults
    for case, before in zip(cases, expected, strict=True):
        torch.testing.assert_close(states(backbone, *case, engine), before, atol=1e-4, rtol=1e-4)

"""How fast the LLM writes, and how long it takes to read an image's vokens: ours and transformers' `generate`.

Letters: T tokens, n vokens, D width of the LLM, L and C of a condition.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from ..apps.open_model import load
from ..engines import Backend
from ..errors import Mgp5Error
from ..heads.minigpt5 import predicting_states
from ..hub import Parts
from ..inference.decoder import Decoder
from ..inference.token_sampling import SamplingParams
from ..loading import assemble
from ..memory.skeletons import backbone_shape, generator_shape
from ..model import InterleavedModel
from .suites import Limits, Row, Run, by_turns, waiting

PROMPT, REPLY = 64, 128  # tokens


def decode_rows(
    parts: Parts, *, limits: Limits, backends: tuple[Backend, ...], device: torch.device, dtype: torch.dtype, **how: Any
) -> Iterator[Row]:
    """One row for each way to read a prompt and write a reply: milliseconds of a token, the reading counted in, and
    `gb_per_s` of weights, which each token reads once.

    Args:
        how: clock and setting of `by_turns`.
    """
    torch._dynamo.reset()
    model = _model(parts, device, dtype)
    size = f"{_name(parts)}, {REPLY} tokens behind {PROMPT}"
    weights = read_bytes(model)
    for way, timed in by_turns(size, _mode(model, backends), device=device, weights=_held(model), **how).items():
        row = {"name": "decode", "size": size, "provider": way} | timed.row(0, REPLY)
        if not timed.skipped:
            rate = weights / row["median"] / 1e6
            row |= {"tokens_per_s": float(f"{1000 / row['median']:.4g}"), "gb_per_s": float(f"{rate:.4g}")}
            row["share_of_copy"] = round(rate / limits.copy, 3)
        yield row


def condition_rows(
    parts: Parts, *, device: torch.device, dtype: torch.dtype, **how: Any
) -> Generator[Row, None, float | None]:
    """A row of the time between text and denoising: vokens behind a prompt, and the mapper. Returns its seconds."""
    model = _model(parts, device, dtype)
    size = f"{_name(parts)}, {model.head.num_vokens} vokens behind {PROMPT}, mapper"
    timed = by_turns(size, {"eager": lambda: _vokens(model)}, device=device, weights=_held(model), **how)["eager"]
    yield {"name": "condition", "size": size, "provider": "eager"} | timed.row()
    return None if timed.skipped else timed.median(0)


def _model(parts: Parts, device: torch.device, dtype: torch.dtype) -> InterleavedModel:
    """A trained model; or an LLM and a mapper of random weights, with a generator that has none."""
    if parts.trained is not None:
        return load(parts.name, dtype=dtype, device=str(device), backend=None, memory="full")
    with torch.device("meta"):
        generator = generator_shape(parts.diffusion)
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        with torch.device(device):
            backbone = backbone_shape(parts.mllm)
    finally:
        torch.set_default_dtype(before)
    with torch.device(device):
        return assemble(backbone, generator, parts.mllm, parts.diffusion)


def read_bytes(model: InterleavedModel) -> int:
    """Of the weights that each token needs: layers and LM head, of the embedding only a row."""
    backbone = model.backbone
    embedding = backbone.core.get_input_embeddings().weight
    layers = sum(p.nbytes for p in backbone.language.parameters() if p is not embedding)
    return layers + backbone.lm_head.weight.nbytes


def _name(parts: Parts) -> str:
    return Path(parts.name.partition("+")[0]).name


def _held(model: InterleavedModel) -> int:
    """Bytes of LLM and mapper."""
    return sum(p.nbytes for part in (model.backbone, model.head) for p in part.parameters())


def _mode(model: InterleavedModel, backends: tuple[Backend, ...]) -> dict[str, Callable[[], Run]]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(10, 100, (1, PROMPT), generator=generator).to(model.device)
    ways: dict[str, Callable[[], Run]] = {
        "transformers dynamic": lambda: _theirs(model, ids, None),
        "eager": lambda: _ours(model, ids, compiled=False),
        "transformers static": lambda: _theirs(model, ids, "static"),
    }
    if "compile" in backends:
        ways["compile"] = lambda: _ours(model, ids, compiled=True)
    return ways


def _theirs(model: InterleavedModel, ids: Tensor, cache: str | None) -> Run:
    """`generate`, which compiles its step by itself for a static cache on a GPU."""
    core, device = model.backbone.core, ids.device
    core.generation_config = GenerationConfig(pad_token_id=0)  # the model's own has an end of text, where it stops
    how = {"do_sample": False, "max_new_tokens": REPLY, "cache_implementation": cache}
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def run() -> tuple[float, ...]:
        seconds, out = waiting(lambda: core.generate(**given, **how), device)
        if out.shape[1] != PROMPT + REPLY:
            raise Mgp5Error(f"{out.shape[1] - PROMPT} tokens were made, not {REPLY}")
        return (seconds,)

    return run


def _ours(model: InterleavedModel, ids: Tensor, compiled: bool) -> Run:
    """The most likely tokens, as `generate` asks for them: on a GPU in pieces, by a CUDA graph of a step."""
    model.backbone.compiled = compiled
    decoder = Decoder(model.backbone)
    decoder.speak(0, SamplingParams(temperature=0, top_p=1, penalty=1, generator=torch.Generator()), banned=())

    def write() -> None:
        decoder.cut(0, 0)
        token = decoder.pick({0: _read(decoder, ids)[0, -1]})[0]
        for start in range(1, REPLY, decoder.tokens_per_sync):
            chosen, _ = decoder.steps({0: token}, min(decoder.tokens_per_sync, REPLY - start))[0]
            token = chosen[-1]

    @torch.inference_mode()
    def run() -> tuple[float, ...]:
        return (waiting(write, ids.device)[0],)

    return run


def _vokens(model: InterleavedModel) -> Run:
    """The vokens of an image in one forward, behind a prompt, and the mapper."""
    backbone, head = model.backbone, model.head
    decoder, vokens = Decoder(backbone), torch.tensor([head.ids], device=model.device)
    with torch.inference_mode():
        state = _read(decoder, torch.zeros(1, PROMPT, dtype=torch.long, device=model.device))[:, -1:]

    def condition() -> Tensor:  # (1, L, C)
        hidden = torch.cat([state, decoder.feed([0], backbone.embed(vokens, []))], dim=1)
        return head.mapper(predicting_states(hidden, [0], [1], head.num_vokens))

    @torch.inference_mode()
    def run() -> tuple[float, ...]:
        decoder.cut(0, PROMPT)
        return (waiting(condition, model.device)[0],)

    return run


def _read(decoder: Decoder, ids: Tensor) -> Tensor:  # (1, T, D)
    """Read a prompt of text (1, T)."""
    backbone = decoder.backbone
    return decoder.read(0, backbone.embed(ids, []), backbone.positions(ids, None))

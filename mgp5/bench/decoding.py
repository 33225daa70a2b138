"""Time decoding by our decoder and by `generate` of transformers, all that comes before an image's first step, and
whole images of heads without a denoiser.

Letters: T tokens, D width of the LLM.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Generator, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.modeling_utils import local_torch_dtype

from ..apps.open_model import load, set_backend
from ..engines.decode import FusedDecode, fused_decode, map_in_half
from ..errors import Mgp5Error
from ..heads import DrawContext, Embeds, Forced, Response, Sample, Step
from ..hub import Parts
from ..inference.decoder import Decoder
from ..inference.token_sampling import SamplingParams
from ..loading import assemble
from ..memory.skeletons import backbone_shape, generator_shape
from ..model import InterleavedModel
from ..options import Backend
from .timing import Bench, Limits, Phases, Row, digits, interleave

PROMPT, REPLY = 64, 128  # tokens


def decode_rows(
    bench: Bench, parts: Parts, counts: tuple[int, ...] = (1,), *, limits: Limits | None = None
) -> Iterator[Row]:
    """Yield one row for each way to read prompts and to write replies, for each number of replies at once.

    Their times are milliseconds of a token of each reply, the reading counted in; `gb_per_s` is the rate at which
    weights are read, once for a token of all replies.
    """
    model = make_model(parts, bench)
    weights = read_bytes(model)
    for count in counts:
        torch._dynamo.reset()
        size = f"{_name(parts)}, {REPLY} tokens behind {PROMPT}" + f", {count} at once" * (count > 1)
        for way, timing in interleave(bench, size, ways(model, bench.backends, count), _held(model)).items():
            row = {"name": "decode", "size": size, "provider": way} | timing.row(0, REPLY)
            if not timing.skipped:
                rate = weights / row["median"] / 1e6
                row |= {"tokens_per_s": digits(1000 * count / row["median"]), "gb_per_s": digits(rate)}
                row |= {"share_of_copy": round(rate / limits.copy, 3)} if limits else {}
            yield row


def condition_rows(bench: Bench, parts: Parts) -> Generator[Row, None, float | None]:
    """Yield a row of the time between text and the head's first step: what the LLM does for an image, behind a prompt.

    Returns its median in seconds, None where it was skipped.
    """
    model = make_model(parts, bench)
    size = f"{_name(parts)}, {model.head.spec.positions} positions behind {PROMPT}"
    for way, timing in interleave(bench, size, condition_ways(model, bench.backends), _held(model)).items():
        yield {"name": "condition", "size": size, "provider": way} | timing.row()
    return None if timing.skipped else timing.median(0)  # of the best, which stands last


def image_rows(bench: Bench, parts: Parts, counts: tuple[int, ...] = (1,)) -> Iterator[Row]:
    """Yield a row for each engine and number of images at once, by a trained model that draws without a denoiser.

    Times are milliseconds of all the images behind a prompt, by LLM and head, but for `vae_ms` to pixels; `image_ms` is
    one image with both.
    """
    model = make_model(parts, bench)
    for count in counts:
        size = f"{Path(parts.name).name}, {model.head.spec.positions} positions behind {PROMPT}, {count} at once"
        found = {name: partial(_images, model, name, bench.exported, count) for name in bench.backends}
        for way, timing in interleave(bench, size, found, _held(model)).items():
            row = {"name": "image", "size": size, "provider": way} | timing.row()
            if not timing.skipped:
                row["vae_ms"] = digits(1000 * timing.median(1))
                row["image_ms"] = digits(1000 * (timing.median(0) + timing.median(1)) / count)
            yield row


def make_model(parts: Parts, bench: Bench) -> InterleavedModel:
    """Return a trained model; or an LLM and a head of random weights, with a generator that has no weights."""
    if parts.trained is not None:
        return load(parts.name, dtype=bench.dtype, device=str(bench.device), backend=None, memory="full")
    with torch.device("meta"):
        generator = generator_shape(parts.diffusion)
    with torch.device(bench.device):
        with local_torch_dtype(bench.dtype, "a benchmark"):
            backbone = backbone_shape(parts.mllm)
        return assemble(backbone, generator, parts.mllm, parts.diffusion)


def read_bytes(model: InterleavedModel) -> int:
    """Return the bytes of the weights that each token reads: layers and LM head; of the embedding it reads one row."""
    backbone = model.backbone
    embedding = backbone.core.get_input_embeddings().weight
    layers = sum(p.nbytes for p in backbone.language.parameters() if p is not embedding)
    return layers + backbone.lm_head.weight.nbytes


def _name(parts: Parts) -> str:
    return Path(parts.name.partition("+")[0]).name


def _held(model: InterleavedModel) -> int:
    """Return the bytes of LLM and head."""
    return sum(p.nbytes for part in (model.backbone, model.head) for p in part.parameters())


def ways(model: InterleavedModel, backends: tuple[str, ...], count: int = 1) -> dict[str, Callable[[], Phases]]:
    """Return the ways to write the most likely tokens of so many replies."""
    ids = torch.randint(10, 100, (1, PROMPT), generator=torch.Generator().manual_seed(0)).to(model.device)
    ids = ids.expand(count, -1)
    found = {
        "transformers dynamic": lambda: _theirs(model, ids, None),
        "eager": lambda: _ours(model, ids, compiled=False),
        "transformers static": lambda: _theirs(model, ids, "static"),
    }
    if fused := _fused(model, backends):
        found["triton"] = lambda: _ours(model, ids, compiled=False, engine=fused)
    return found | ({"compile": lambda: _ours(model, ids, compiled=True)} if "compile" in backends else {})


def condition_ways(model: InterleavedModel, backends: tuple[str, ...]) -> dict[str, Callable[[], Phases]]:
    """Return the ways to make a condition: by the LLM and the head as they are, and by fused kernels."""
    found = {"eager": lambda: _condition(model)}
    fused = _fused(model, backends)
    return found | ({"triton": lambda: _condition(model, fused)} if fused else {})


def _fused(model: InterleavedModel, backends: tuple[str, ...]) -> FusedDecode | None:
    """Return what decodes by fused kernels, if that is a way to be timed and runs here."""
    return fused_decode(model.backbone) if "triton" in backends else None


def _theirs(model: InterleavedModel, ids: Tensor, cache: str | None) -> Phases:
    """Prepare `generate`, which compiles its step by itself for a static cache on a GPU."""
    core = model.backbone.core
    core.generation_config = GenerationConfig(pad_token_id=0)  # the model's own has an end of text, where it stops
    options = {"do_sample": False, "max_new_tokens": REPLY, "cache_implementation": cache}

    def write() -> None:
        made = core.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options).shape[1] - PROMPT
        if made != REPLY:
            raise Mgp5Error(f"{made} tokens were made, not {REPLY}")

    return (write,)


def _ours(model: InterleavedModel, ids: Tensor, compiled: bool, engine: FusedDecode | None = None) -> Phases:
    """Prepare our decoder; on a GPU, several steps of one CUDA graph run between two synchronizations."""
    model.backbone.compiled, model.backbone.engine = compiled, engine
    decoder = Decoder(model.backbone, len(ids))
    for row in range(len(ids)):
        params = SamplingParams(temperature=0, top_p=1, penalty=1, rng=torch.Generator())
        decoder.set_sampling(row, params, banned=())

    @torch.inference_mode()
    def write() -> None:
        model.backbone.engine = engine  # other ways are timed in turn
        for row in range(len(ids)):
            decoder.cut(row, 0)
        tokens = decoder.pick({row: _read(decoder, ids[row : row + 1], row)[0, -1] for row in range(len(ids))})
        for start in range(1, REPLY, decoder.tokens_per_sync):
            chosen = decoder.steps(tokens, min(decoder.tokens_per_sync, REPLY - start))
            tokens = {row: each[-1] for row, (each, _) in chosen.items()}

    return (write,)


def _condition(model: InterleavedModel, engine: FusedDecode | None = None) -> Phases:
    """Prepare what the LLM is asked for behind a prompt when an image is drawn, and what the head makes of it."""
    decoder, head = Decoder(model.backbone), model.head
    if (mapper := copy.deepcopy(getattr(head, "mapper", None))) and engine:
        map_in_half(SimpleNamespace(mapper=mapper), model.backbone)
    with torch.inference_mode():
        state = _read(decoder, torch.zeros(1, PROMPT, dtype=torch.long, device=model.device))[:, -1:]
    context = DrawContext(state, head.spec.image_options(), lambda use: torch.Generator())

    @torch.inference_mode()
    def condition() -> None:
        model.backbone.engine = engine  # other ways are timed in turn
        if mapper:
            head.mapper = mapper
        decoder.cut(0, PROMPT)
        drawing, last, response = head.draw(context), state, None
        while not isinstance(request := drawing.send(response), Step):
            response = _answer(decoder, request, last)
            last = response.hidden[:, -1:]
        drawing.close()

    return (condition,)


def _images(model: InterleavedModel, backend: Backend, exported: Path | None, count: int) -> Phases:
    """Prepare images that are drawn side by side by an engine, which a copy of the head has."""
    own = SimpleNamespace(backbone=model.backbone, head=copy.deepcopy(model.head))
    set_backend(own, backend, exported if backend == "onnx" else None)
    decoder, head, rows, last = Decoder(own.backbone, count), own.head, [*range(count)], []
    prompt = torch.zeros(1, PROMPT, dtype=torch.long, device=model.device)
    with torch.inference_mode():
        states = [_read(decoder, prompt, row)[:, -1:] for row in rows]

    def draw() -> None:
        for row in rows:
            decoder.cut(row, PROMPT)
        how = head.spec.image_options(), lambda use: torch.Generator().manual_seed(0)
        drawings, replies = [head.draw(DrawContext(state, *how)) for state in states], [None] * count
        while True:
            requests = [drawing.send(reply) for drawing, reply in zip(drawings, replies, strict=True)]
            match requests[0]:
                case Step(key=("decode", *_)):
                    break
                case Step(key=key):
                    outputs = head.step(key, [request.inputs for request in requests])
                    replies = [Response(output=output) for output in outputs]
                case Embeds():
                    hidden = decoder.feed(rows, torch.cat([request.embeds for request in requests]))
                    replies = [Response(state) for state in hidden.split(1)]
                case Forced(ids=ids):
                    embeds = decoder.backbone.embed(torch.tensor([ids] * count, device=decoder.device), [])
                    replies = [Response(state, ids) for state in decoder.feed(rows, embeds).split(1)]
                case _:
                    replies = [None] * count
        last[:] = requests

    decode = torch.inference_mode()(lambda: head.step(last[0].key, [request.inputs for request in last]))
    return torch.inference_mode()(draw), decode


def _answer(decoder: Decoder, request: Forced | Embeds | Sample, state: Tensor) -> Response:
    """Answer a head as the scheduler does; `state` (1, 1, D) predicts the next token."""
    if isinstance(request, Forced) and request.then:
        embeds = decoder.backbone.embed(torch.tensor([request.ids], device=decoder.device), [])
        hidden, (output,) = decoder.run([0], embeds, state, request)
        return Response(hidden, request.ids, output)
    if not isinstance(request, Sample):
        ids = request.ids if isinstance(request, Forced) else ()
        embeds = request.embeds if not ids else decoder.backbone.embed(torch.tensor([ids], device=decoder.device), [])
        return Response(decoder.feed([0], embeds), ids)
    params = SamplingParams(request.temperature, request.top_p, 1.0, request.rng, top_k=request.top_k)
    decoder.set_sampling(0, params, allowed=request.allowed[0])
    ids, states = [decoder.pick({0: state[0, 0]})[0]], [state]
    while len(ids) < request.count:
        chosen, hidden = decoder.steps({0: ids[-1]}, min(decoder.tokens_per_sync, request.count - len(ids)))[0]
        ids, states = ids + chosen, [*states, hidden[None]]
    return Response(torch.cat(states, dim=1), tuple(ids))


def _read(decoder: Decoder, ids: Tensor, row: int = 0) -> Tensor:  # (1, T, D)
    """Read a prompt of text, (1, T), into the cache; return its hidden states."""
    backbone = decoder.backbone
    return decoder.read(row, backbone.embed(ids, []), backbone.positions(ids, None))

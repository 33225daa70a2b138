"""Decoding: conversations as rows of one batch, token after token on the device without waiting for the host.

Letters: R rows, r rows that take part, k tokens read at once, n tokens decoded per sync, D LLM width, E embedding
width, V vocabulary, W slots that attention sees, N images that layers of the LLM attend to besides the sequence.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.rnn import pad_sequence

from ..backbones import SideInputs
from ..backbones.kv_cache import SMALLEST, causal_mask, read
from ..device import record
from .graphs import DecodeBuffers, RunBuffers
from .token_sampling import PAUSED, SamplingParams, penalise, sample

if TYPE_CHECKING:
    from ..backbones import Backbone
    from ..engines.decode import FusedDecode
    from ..heads import Forced

TOKENS_PER_SYNC = 8  # on a GPU
GRAPHS = 24  # kept; each holds little memory, as all share one pool


@dataclass
class Row:
    """One conversation of the batch."""

    length: int = 0  # tokens in its cache
    position: int = 0  # the next rotary position
    sampling: SamplingParams | None = None
    side: Tensor | None = None  # (N, ...), `SideInputs.features` of all its images so far


class SamplingMode(NamedTuple):
    """What the rows of a step need to sample; the rest is left out of it."""

    random: bool  # some sample
    greedy: bool  # some take the most likely token
    penalised: bool  # some have a repetition penalty


class Decoder:
    """The R rows of one batch, which read, decode and are cut back independently of each other.

    With `bucket` 1 only the rows that decode run, over the slots they fill. Otherwise all rows run, paused ones too,
    over a power of two of slots, at least this number: the shapes of CUDA graphs and compiled code.
    """

    def __init__(
        self,
        backbone: Backbone,
        rows: int = 1,
        *,
        tokens_per_sync: int | None = None,  # between two looks of the host at the tokens; None: 8 on a GPU, else 1
        bucket: int | None = None,  # None: what fits
    ) -> None:
        self.backbone, self.device = backbone, backbone.device
        self.on_gpu = self.device.type == "cuda"
        self.tokens_per_sync = tokens_per_sync or (TOKENS_PER_SYNC if self.on_gpu else 1)
        self.bucket = bucket or (SMALLEST if self.on_gpu or backbone.compiled else 1)
        self.rows = [Row() for _ in range(rows)]
        self.cache = backbone.new_cache(rows)
        self._sides: tuple[list[Tensor | None], SideInputs | None] = [], None  # of rows, and padded
        self._axes: tuple[int, ...] = ()  # (3,) where positions have time, height and width
        self._graphs: dict[tuple[Any, ...], Any] = {}
        self._seen: set[tuple[Any, ...]] = set()  # shapes of runs
        self._pool = torch.cuda.graph_pool_handle() if self.on_gpu else None
        self._buffers: dict[int, DecodeBuffers] = {}  # by number of rows
        with torch.inference_mode(False):
            shape = 2, rows, len(backbone.lm_head.weight)
            self.banned, self.generated = torch.zeros(shape, dtype=torch.bool, device=self.device)
        self._language = _compiled(backbone, self.on_gpu) if backbone.compiled else backbone

    def set_sampling(
        self, row: int, params: SamplingParams, *, banned: Iterable[int] = (), allowed: Any = None
    ) -> None:
        """Set how a row samples its tokens: of the `allowed` ids, None for all, but the banned ones and padding."""
        self.rows[row].sampling = params
        self.banned[row] = allowed is not None
        if allowed is not None:
            self.banned[row, list(allowed)] = False
        self.banned[row, list(banned)] = True
        self.banned[row, self.backbone.vocabulary :] = True

    def cut(self, row: int, length: int) -> None:
        """Take back all tokens of a row but the first `length`; nothing is copied."""
        state = self.rows[row]
        state.position -= state.length - length
        state.length = length

    def read(self, row: int, embeds: Tensor, positions: Tensor, side: SideInputs | None = None) -> Tensor:  # (1, k, D)
        """Read embeddings (1, k, E) at rotary positions (1, k) or (3, 1, k); return the state after each token."""
        self._axes = positions.shape[:-2]
        hidden = self._read([row], embeds, positions, side)
        self.rows[row].position = int(positions.max()) + 1
        return hidden

    def feed(self, rows: Sequence[int], embeds: Tensor) -> Tensor:  # (r, k, D)
        """Read embeddings (r, k, E) behind what the rows hold, in one forward without the LM head; the states."""
        steps = torch.arange(embeds.shape[1], device=self.device)
        positions = torch.tensor([[self.rows[row].position] for row in rows], device=self.device) + steps
        side = self._side(rows, embeds.shape[1])
        hidden = self._read(rows, embeds, positions.expand(*self._axes, *positions.shape), side)
        for row in rows:
            self.rows[row].position += embeds.shape[1]
        return hidden

    def run(
        self, rows: Sequence[int], embeds: Tensor, before: Tensor, run: Forced
    ) -> tuple[Tensor, Sequence[Tensor | None]]:  # (r, k, D), and for each row (1, ...)
        """Read the embeddings (r, k, E) of a run as `feed` does; return its states, and what `run.then` makes of those
        `before` it (r, 1, D) and its own. On a GPU both are one CUDA graph when a shape comes the second time, where
        they can be captured."""
        side, length = self._side(rows, embeds.shape[1]), embeds.shape[1]
        key = known = None
        if side is None and run.capturable and self._captures:
            width = self._width([self.rows[row].length for row in rows], length)
            key = len(rows), length, width, run.then
            known = key in self._seen
            self._seen.add(key)
        if not known:
            hidden = self.feed(rows, embeds)
            if not run.then:
                return hidden, [None] * len(rows)
            return hidden, [run.then(states) for states in torch.cat([before, hidden], dim=1).split(1)]
        starts = torch.tensor([[self.rows[row].length, self.rows[row].position] for row in rows], device=self.device)
        ends = starts.T[..., None] + torch.arange(length, device=self.device)  # (2, r, k)
        inputs = embeds, before, torch.tensor(rows, device=self.device), ends[0] + self.cache.prefix_length, ends[1]

        def make() -> tuple[RunBuffers, Callable[[], Any]]:
            buffers = RunBuffers(inputs, partial(self._run, width, run.then))
            idle = partial(buffers.inputs[3].fill_, self.cache.index.capacity - 1)
            return buffers, self._replayed(buffers, idle)

        buffers, replay = self._graph(key, make)
        buffers.load(inputs)
        replay()
        for row in rows:
            self.rows[row].length += length
            self.rows[row].position += length
        hidden, *output = (result.clone() for result in buffers.results)  # the next graph may overwrite them
        return hidden, output[0].split(1) if output else [None] * len(rows)

    def pick(self, states: dict[int, Tensor]) -> dict[int, int]:
        """Sample a token of each row from the state (D,) that predicts it."""
        rows = sorted(states)
        buffers = self._load(dict.fromkeys(rows, 0), rows, 1)
        hidden = torch.stack([states[row] for row in rows])
        tokens = self._sample(buffers, hidden, self._mode(rows), self.backbone.logits)
        return dict(zip(rows, tokens.tolist(), strict=True))

    def steps(self, tokens: dict[int, int], count: int) -> dict[int, tuple[list[int], Tensor]]:
        """Read a token of each row, sample the next, read that, and so on, without waiting for the device.

        `tokens` has the first token of each row, `count` is n, at most `tokens_per_sync`. Returns for each row n
        sampled tokens, of which the last is not read yet, and the states (n, D) that predict them.
        """
        rows = sorted(tokens) if self.bucket == 1 else list(range(len(self.rows)))
        width = self._width([self.rows[row].length for row in tokens], count)
        advance = self._advance(rows, width, self._mode(tokens))
        buffers = self._load(tokens, rows, count)
        for _ in range(count):
            advance()
        chosen, states = buffers.tokens[:count].T.tolist(), buffers.states[:count].transpose(0, 1).clone()
        for row in tokens:
            self.rows[row].length += count
            self.rows[row].position += count
        return {row: (chosen[i], states[i]) for i, row in enumerate(rows) if row in tokens}

    def _mode(self, rows: Iterable[int]) -> SamplingMode:
        params = [self.rows[row].sampling for row in rows]
        greedy = [each.temperature == 0 for each in params]
        return SamplingMode(not all(greedy), any(greedy), any(each.penalty != 1 for each in params))

    @property
    def _captures(self) -> bool:
        return self.on_gpu and self.backbone.capturable

    def _width(self, lengths: Sequence[int], count: int) -> int:
        """Return how many slots rows of these lengths see when they read `count` more tokens; make room for them."""
        end = max(lengths) + self.cache.prefix_length + count
        self._reserve(end)
        return end if self.bucket == 1 else max(self.bucket, 1 << (end - 1).bit_length())

    def _reserve(self, length: int) -> None:
        if self.cache.reserve(length):
            self._graphs.clear()  # they read the cache where it lay

    def _read(
        self, rows: Sequence[int], embeds: Tensor, positions: Tensor, side: SideInputs | None
    ) -> Tensor:  # (r, k, D)
        length = embeds.shape[1]
        starts = [self.rows[row].length + self.cache.prefix_length for row in rows]
        self._reserve(max(starts) + length)
        hidden = read(self.backbone, self.cache, rows, starts, embeds, positions, side)
        for row in rows:
            self.rows[row].length += length
        return hidden

    def _side(self, rows: Sequence[int], tokens: int) -> SideInputs | None:
        """Return the side inputs of the next tokens of rows: all images of each row so far."""
        sides, (known, padded) = [self.rows[row].side for row in rows], self._sides
        first = next((side for side in sides if side is not None), None)
        if first is None:
            self._sides = [], None
            return None
        if len(sides) != len(known) or any(map(operator.is_not, sides, known)):
            given = [first[:0] if side is None else side for side in sides]
            counts = torch.tensor([[len(side)] for side in given], device=self.device)
            padded = SideInputs(pad_sequence(given, batch_first=True), counts)
            self._sides = sides, padded
        return padded._replace(visible=padded.visible.expand(-1, tokens))

    def _buffers_for(self, rows: int) -> DecodeBuffers:
        if rows not in self._buffers:
            dtype = self.backbone.lm_head.weight.dtype
            self._buffers[rows] = DecodeBuffers(rows, self.tokens_per_sync, self.backbone.width, self.device, dtype)
        return self._buffers[rows]

    def _load(self, tokens: dict[int, int], rows: list[int], count: int) -> DecodeBuffers:
        """Fill buffers with what the host knows of some rows; those without a token pause."""
        buffers, integers, settings = self._buffers_for(len(rows)), [], []
        for row in rows:
            state = self.rows[row]
            slot = state.length + self.cache.prefix_length if row in tokens else self.cache.index.capacity - 1
            integers.append([row, slot, state.position, row in tokens, tokens.get(row, 0)])
            params = state.sampling if row in tokens else PAUSED
            chance = params.temperature or 1.0, params.temperature > 0, params.top_p, params.penalty, params.top_k
            settings.append([*chance, *params.numbers(count)])
            if params.penalty != 1:
                self.generated[row] = False
                self.generated[row, list(params.generated_ids)] = True
        buffers.integers.copy_(torch.tensor(integers).T)
        buffers.settings[: 5 + count].copy_(torch.tensor(settings).T)
        buffers.step.zero_()
        return buffers

    def _advance(self, rows: list[int], width: int, mode: SamplingMode) -> Callable[[], None]:
        """Return what runs one step: on a GPU a CUDA graph, where the LLM can be captured."""
        buffers, side = self._buffers_for(len(rows)), self._side(rows, 1)
        step = partial(self._step, buffers, width, mode, side)
        if side is not None or not self._captures:
            return step
        pause = partial(buffers.pause, self.cache.index.capacity - 1)
        return self._graph((width, mode), lambda: self._replayed(step, pause))

    def _replayed(self, work: Callable[[], Any], before: Callable[[], Any]) -> Callable[[], Any]:
        """Return what replays work as a CUDA graph; the work itself on a CPU."""
        return record(work, self._pool, before)[0] if self._pool else work

    def _graph(self, key: tuple[Any, ...], make: Callable[[], Any]) -> Any:
        """Return the graph of a key, made where it is not kept; the one that was used longest ago is dropped."""
        self._graphs[key] = graph = self._graphs.pop(key, None) or make()
        while len(self._graphs) > GRAPHS:
            self._graphs.pop(next(iter(self._graphs)))
        return graph

    def _engine(self, tokens: int, side: SideInputs | None) -> FusedDecode | None:
        """Return what runs a forward of so many tokens by fused kernels, None for the LLM itself."""
        engine = self.backbone.engine
        return engine if engine is not None and side is None and engine.takes(tokens) else None

    def _run(
        self, width: int, then: Callable[[Tensor], Tensor] | None, embeds: Tensor, before: Tensor, *places: Tensor
    ) -> tuple[Tensor, ...]:
        """Read tokens (r, k, E) at rows (r,), slots (r, k) and positions (r, k), by what `run` captures."""
        rows, slots, positions = places
        engine = self._engine(slots.numel(), None)
        self.cache.index.at(rows, slots, width, len(rows) == len(self.rows))
        mask = None if engine else causal_mask(slots, width, embeds.dtype)
        positions = positions.expand(*self._axes, *positions.shape)
        hidden = (engine or self.backbone)(embeds, positions, mask, self.cache)
        return (hidden, then(torch.cat([before, hidden], dim=1))) if then else (hidden,)

    def _step(self, buffers: DecodeBuffers, width: int, mode: SamplingMode, side: SideInputs | None) -> None:
        """Read a token of each row and sample the next; all that changes lies in buffers."""
        if mode.penalised:
            self.generated[buffers.rows, buffers.token] |= buffers.active.bool()
        embeds, slots = self.backbone.embed(buffers.token[:, None], []), buffers.slot[:, None]
        engine = self._engine(len(buffers.rows), side)
        mask = None if engine else causal_mask(slots, width, embeds.dtype)
        self.cache.index.at(buffers.rows, slots, width, len(buffers.rows) == len(self.rows))
        positions = buffers.position[:, None].expand(*self._axes, -1, 1)
        language = engine or (self._language if side is None else partial(self.backbone, side=side))
        hidden = language(embeds, positions, mask, self.cache)[:, 0]
        chosen = self._sample(buffers, hidden, mode, (engine or self.backbone).logits)
        buffers.states.index_copy_(0, buffers.step, hidden[None])
        buffers.tokens.index_copy_(0, buffers.step, chosen[None])
        buffers.step += 1
        buffers.counters += buffers.active
        buffers.token.copy_(chosen)

    def _sample(
        self, buffers: DecodeBuffers, states: Tensor, mode: SamplingMode, head: Callable[[Tensor], Tensor]
    ) -> Tensor:  # (r,)
        """Sample a token from each state (r, D) by its logits, which `head` computes."""
        banned, generated = self.banned, self.generated
        if len(buffers.rows) < len(self.rows):
            banned, generated = banned[buffers.rows], generated[buffers.rows]
        logits = head(states).float().masked_fill(banned, -torch.inf)  # (r, V)
        if mode.penalised:
            logits = penalise(logits, generated, buffers.penalty)
        if not mode.random:
            return logits.argmax(-1)
        numbers = buffers.numbers.index_select(0, buffers.step)[0, :, None]
        sampled = sample(logits, buffers.temperature, buffers.top_p, numbers, buffers.top_k)
        return torch.where(buffers.random[:, 0] > 0, sampled, logits.argmax(-1)) if mode.greedy else sampled


def _compiled(backbone: Backbone, on_gpu: bool) -> Callable[..., Tensor]:
    """Compile the LLM for the shapes of a step, without CUDA graphs of the compiler's own.

    On a GPU, products with one row and attention of one token are written as sums that use the whole card: by
    coordinate descent and the plain formula, as gpt-fast does.
    """
    compiled = torch.compile(
        backbone.forward, dynamic=False, options={"coordinate_descent_tuning": True} if on_gpu else None
    )

    def run(*inputs: Any) -> Tensor:
        plain = sdpa_kernel(SDPBackend.MATH) if on_gpu else nullcontext()
        with plain, torch._dynamo.config.patch(recompile_limit=64):  # one for each number of rows and of slots
            return compiled(*inputs)

    return run

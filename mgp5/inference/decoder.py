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
from .token_sampling import PAUSED, SamplingParams, penalise, sample

if TYPE_CHECKING:
    from ..backbones import Backbone

TOKENS_PER_SYNC = 8  # on a GPU
GRAPHS = 6  # kept; each holds little memory, as all share one pool


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
        self._graphs: dict[tuple[int, SamplingMode], Callable[[], None]] = {}
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

    def pick(self, states: dict[int, Tensor]) -> dict[int, int]:
        """Sample a token of each row from the state (D,) that predicts it."""
        rows = sorted(states)
        buffers = self._load(dict.fromkeys(rows, 0), rows, 1)
        tokens = self._sample(buffers, torch.stack([states[row] for row in rows]), self._mode(rows))
        return dict(zip(rows, tokens.tolist(), strict=True))

    def steps(self, tokens: dict[int, int], count: int) -> dict[int, tuple[list[int], Tensor]]:
        """Read a token of each row, sample the next, read that, and so on, without waiting for the device.

        `tokens` has the first token of each row, `count` is n, at most `tokens_per_sync`. Returns for each row n
        sampled tokens, of which the last is not read yet, and the states (n, D) that predict them.
        """
        rows = sorted(tokens) if self.bucket == 1 else list(range(len(self.rows)))
        end = max(self.rows[row].length for row in tokens) + self.cache.prefix_length + count
        self._reserve(end)
        width = end if self.bucket == 1 else max(self.bucket, 1 << (end - 1).bit_length())
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
        if side is not None or not (self.on_gpu and self.backbone.capturable):
            return step
        key = width, mode
        graph = self._graphs.pop(key, None) or self._capture(step, buffers)
        self._graphs[key] = graph
        while len(self._graphs) > GRAPHS:
            self._graphs.pop(next(iter(self._graphs)))
        return graph

    def _step(self, buffers: DecodeBuffers, width: int, mode: SamplingMode, side: SideInputs | None) -> None:
        """Read a token of each row and sample the next; all that changes lies in buffers."""
        if mode.penalised:
            self.generated[buffers.rows, buffers.token] |= buffers.active.bool()
        embeds, slots = self.backbone.embed(buffers.token[:, None], []), buffers.slot[:, None]
        mask = causal_mask(slots, width, embeds.dtype)
        self.cache.index.at(buffers.rows, slots, width, len(buffers.rows) == len(self.rows))
        positions = buffers.position[:, None].expand(*self._axes, -1, 1)
        language = self._language if side is None else partial(self.backbone, side=side)
        hidden = language(embeds, positions, mask, self.cache)[:, 0]
        chosen = self._sample(buffers, hidden, mode)
        buffers.states.index_copy_(0, buffers.step, hidden[None])
        buffers.tokens.index_copy_(0, buffers.step, chosen[None])
        buffers.step += 1
        buffers.counters += buffers.active
        buffers.token.copy_(chosen)

    def _sample(self, buffers: DecodeBuffers, states: Tensor, mode: SamplingMode) -> Tensor:  # (r,)
        banned, generated = self.banned, self.generated
        if len(buffers.rows) < len(self.rows):
            banned, generated = banned[buffers.rows], generated[buffers.rows]
        logits = self.backbone.logits(states).float().masked_fill(banned, -torch.inf)  # (r, V)
        if mode.penalised:
            logits = penalise(logits, generated, buffers.penalty)
        if not mode.random:
            return logits.argmax(-1)
        numbers = buffers.numbers.index_select(0, buffers.step)[0, :, None]
        sampled = sample(logits, buffers.temperature, buffers.top_p, numbers, buffers.top_k)
        return torch.where(buffers.random[:, 0] > 0, sampled, logits.argmax(-1)) if mode.greedy else sampled

    def _capture(self, step: Callable[[], None], buffers: DecodeBuffers) -> Callable[[], None]:
        """Record a step, after some on another stream, where libraries choose their kernels; all rows pause."""
        buffers.active.zero_()
        buffers.slot.fill_(self.cache.index.capacity - 1)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side), torch.no_grad():
            for _ in range(3):
                buffers.step.zero_()
                step()
        torch.cuda.current_stream().wait_stream(side)
        buffers.step.zero_()
        graph = torch.cuda.CUDAGraph()
        with torch.no_grad(), torch.cuda.graph(graph, pool=self._pool):
            step()
        return graph.replay


class DecodeBuffers:
    """Buffers of r rows that decode together; their addresses stay, as a CUDA graph needs."""

    def __init__(self, rows: int, tokens: int, width: int, device: torch.device, dtype: torch.dtype) -> None:
        with torch.inference_mode(False):
            # (5, r): row, slot, rotary position, whether it is active, and the token to be read
            self.integers = torch.zeros(5, rows, dtype=torch.long, device=device)
            # (5 + n, r): temperature, whether it was not 0, top_p, penalty, top_k, a number in [0, 1) for each step
            self.settings = torch.ones(5 + tokens, rows, device=device)
            self.tokens = torch.zeros(tokens, rows, dtype=torch.long, device=device)  # (n, r), sampled
            self.states = torch.zeros(tokens, rows, width, dtype=dtype, device=device)  # (n, r, D), that predict them
            self.step = torch.zeros(1, dtype=torch.long, device=device)  # steps since the last sync
            self.rows, self.slot, self.position, self.active, self.token = self.integers
            self.temperature, self.random, self.top_p, self.penalty, self.top_k = self.settings[:5, :, None]
            self.counters, self.numbers = self.integers[1:3], self.settings[5:]


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

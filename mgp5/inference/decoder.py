"""Decoding: conversations as rows of one batch, token after token on the device without waiting for the host.

R rows, r rows that take part, k tokens read at once, n tokens of a piece, D width of the LLM, E of embeddings (D or
more), V vocabulary, W slots that attention sees.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..backbones.kv_cache import SMALLEST
from .token_sampling import PAUSED, SamplingParams, penalise, sample

if TYPE_CHECKING:
    from ..backbones import Backbone

TOKENS_PER_SYNC = 8  # tokens between two looks at what was chosen, on a GPU; a CPU waits for nobody
GRAPHS = 6  # kept; each holds little memory, as all share one pool


@dataclass
class Row:
    """One conversation of the batch: tokens read, the next rotary position, and how it speaks."""

    length: int = 0
    position: int = 0
    voice: SamplingParams | None = None


class SamplingMode(NamedTuple):
    """How the rows that speak together choose: work that no row needs is left out of a step."""

    random: bool  # some by chance
    greedy: bool  # some the most likely token
    penalised: bool  # some with a penalty


class Decoder:
    """The rows of one batch, that read, speak and are cut back independently of each other.

    Args:
        rows: R; they may begin and end at any time.
        piece: the most tokens to choose between two looks at them; None: 8 on a GPU, 1 on a CPU.
        bucket: 1 runs the rows that speak over the slots they fill. Otherwise all rows run, paused ones too, over a
            power of two of slots, at least this number: the shapes of CUDA graphs and compiled code. None: what fits.
    """

    def __init__(self, backbone: Backbone, rows: int = 1, *, piece: int | None = None, bucket: int | None = None):
        device, width, dtype = backbone.device, backbone.width, backbone.lm_head.weight.dtype
        self.backbone, self.device = backbone, device
        self.on_gpu = device.type == "cuda"
        self.piece = piece or (TOKENS_PER_SYNC if self.on_gpu else 1)
        self.bucket = bucket or (SMALLEST if self.on_gpu or backbone.compiled else 1)
        self.rows = [Row() for _ in range(rows)]
        self.cache = backbone.new_cache(rows)
        self._axes: tuple[int, ...] = ()  # (3,) where positions have time, height and width
        self._graphs: dict[tuple[int, SamplingMode], Callable[[], None]] = {}
        self._pool = torch.cuda.graph_pool_handle() if self.on_gpu else None
        self._buffers: dict[int, DecodeBuffers] = {}
        with torch.inference_mode(False):
            self.banned, self.said = torch.zeros(2, rows, len(backbone.lm_head.weight), dtype=torch.bool, device=device)
            self._new_lanes = partial(DecodeBuffers, piece=self.piece, width=width, device=device, dtype=dtype)
        self._language = _compiled(backbone, self.on_gpu) if backbone.compiled else backbone

    def speak(self, row: int, voice: SamplingParams, banned: Iterable[int]) -> None:
        """Set how a row chooses its tokens, and which it must not choose."""
        self.rows[row].voice = voice
        self.banned[row] = False
        self.banned[row, list(banned)] = True

    def cut(self, row: int, length: int) -> None:
        """Take back all tokens of a row but the first `length`; nothing is copied."""
        own = self.rows[row]
        own.position -= own.length - length
        own.length = length

    def read(self, row: int, embeds: Tensor, positions: Tensor) -> Tensor:  # (1, k, D)
        """Read the embeddings (1, k, E) of a prompt at rotary positions (1, k) or (3, 1, k); the state after each."""
        self._axes = positions.shape[:-2]
        hidden = self._read([row], embeds, positions)
        self.rows[row].position = int(positions.max()) + 1
        return hidden

    def feed(self, rows: Sequence[int], embeds: Tensor) -> Tensor:  # (r, k, D)
        """Read embeddings (r, k, E) behind what the rows hold, in one forward without the LM head."""
        steps = torch.arange(embeds.shape[1], device=self.device)
        positions = torch.tensor([[self.rows[row].position] for row in rows], device=self.device) + steps
        hidden = self._read(rows, embeds, positions.expand(*self._axes, *positions.shape))
        for row in rows:
            self.rows[row].position += embeds.shape[1]
        return hidden

    def pick(self, states: dict[int, Tensor]) -> dict[int, int]:
        """Choose a token of each row by the state (D,) that predicts it."""
        rows = sorted(states)
        lanes = self._load(dict.fromkeys(rows, 0), rows, 1)
        tokens = self._choose(lanes, torch.stack([states[row] for row in rows]), self._mode(rows))
        return dict(zip(rows, tokens.tolist(), strict=True))

    def steps(self, tokens: dict[int, int], count: int) -> dict[int, tuple[list[int], Tensor]]:
        """Read a token of each row, choose the one behind it, read that, and so on, without waiting for the device.

        Args:
            tokens: row -> the token to begin with.
            count: n, at most `piece`.

        Returns:
            row -> n tokens chosen, of which the last is not read yet, and the states (n, D) that predict them.
        """
        rows = sorted(tokens) if self.bucket == 1 else list(range(len(self.rows)))
        end = max(self.rows[row].length for row in tokens) + self.cache.prefix_length + count
        self._reserve(end)
        width = end if self.bucket == 1 else max(self.bucket, 1 << (end - 1).bit_length())
        advance = self._advance(len(rows), width, self._mode(tokens))
        lanes = self._load(tokens, rows, count)
        for _ in range(count):
            advance()
        chosen, states = lanes.tokens[:count].T.tolist(), lanes.states[:count].transpose(0, 1).clone()
        for row in tokens:
            self.rows[row].length += count
            self.rows[row].position += count
        return {row: (chosen[i], states[i]) for i, row in enumerate(rows) if row in tokens}

    def _mode(self, rows: Iterable[int]) -> SamplingMode:
        voices = [self.rows[row].voice for row in rows]
        greedy = [voice.temperature == 0 for voice in voices]
        return SamplingMode(not all(greedy), any(greedy), any(voice.penalty != 1 for voice in voices))

    def _reserve(self, length: int) -> None:
        if self.cache.reserve(length):
            self._graphs.clear()  # they read the cache where it lay

    def _read(self, rows: Sequence[int], embeds: Tensor, positions: Tensor) -> Tensor:  # (r, k, D)
        length = embeds.shape[1]
        starts = [self.rows[row].length + self.cache.prefix_length for row in rows]
        width = max(starts) + length
        self._reserve(width)
        slots = torch.tensor(starts, device=self.device)[:, None] + torch.arange(length, device=self.device)
        where = torch.tensor(rows, device=self.device)
        self.cache.place.at(where, slots, width, list(rows) == list(range(len(self.rows))))
        hidden = self.backbone(embeds, positions, visible(slots, width, embeds.dtype), self.cache)
        for row in rows:
            self.rows[row].length += length
        return hidden

    def _load(self, tokens: dict[int, int], rows: list[int], count: int) -> DecodeBuffers:
        """Fill buffers with what the host knows of some rows; those without a token pause."""
        if len(rows) not in self._buffers:
            self._buffers[len(rows)] = self._new_lanes(len(rows))
        lanes, whole, settings = self._buffers[len(rows)], [], []
        for row in rows:
            own, voice = self.rows[row], self.rows[row].voice
            slot = own.length + self.cache.prefix_length if row in tokens else self.cache.place.capacity - 1
            whole.append([row, slot, own.position, row in tokens, tokens.get(row, 0)])
            active = voice if row in tokens else PAUSED
            chance = active.temperature or 1.0, active.temperature > 0, active.top_p, active.penalty
            settings.append([*chance, *active.numbers(count)])
            if active.penalty != 1:
                self.said[row] = False
                self.said[row, list(active.said)] = True
        lanes.whole.copy_(torch.tensor(whole).T)
        lanes.settings[: 4 + count].copy_(torch.tensor(settings).T)
        lanes.step.zero_()
        return lanes

    def _advance(self, lanes: int, width: int, ways: SamplingMode) -> Callable[[], None]:
        """What one step of a piece runs: on a GPU a CUDA graph, where the LLM can be captured."""
        if lanes not in self._buffers:
            self._buffers[lanes] = self._new_lanes(lanes)
        step = partial(self._step, self._buffers[lanes], width, ways)
        if not (self.on_gpu and self.backbone.capturable):
            return step
        key = width, ways
        graph = self._graphs.pop(key, None) or self._capture(step, self._buffers[lanes])
        self._graphs[key] = graph
        while len(self._graphs) > GRAPHS:
            self._graphs.pop(next(iter(self._graphs)))
        return graph

    def _step(self, lanes: DecodeBuffers, width: int, ways: SamplingMode) -> None:
        """Read a token of each lane and choose the next; all that changes lies in buffers."""
        if ways.penalised:
            self.said[lanes.rows, lanes.token] |= lanes.active.bool()
        embeds, slots = self.backbone.embed(lanes.token[:, None], []), lanes.slot[:, None]
        mask = visible(slots, width, embeds.dtype)
        self.cache.place.at(lanes.rows, slots, width, len(lanes.rows) == len(self.rows))
        positions = lanes.position[:, None].expand(*self._axes, -1, 1)
        hidden = self._language(embeds, positions, mask, self.cache)[:, 0]
        chosen = self._choose(lanes, hidden, ways)
        lanes.states.index_copy_(0, lanes.step, hidden[None])
        lanes.tokens.index_copy_(0, lanes.step, chosen[None])
        lanes.step += 1
        lanes.counters += lanes.active
        lanes.token.copy_(chosen)

    def _choose(self, lanes: DecodeBuffers, states: Tensor, ways: SamplingMode) -> Tensor:  # (r,)
        banned, said = self.banned, self.said
        if len(lanes.rows) < len(self.rows):
            banned, said = banned[lanes.rows], said[lanes.rows]
        logits = self.backbone.logits(states).float().masked_fill(banned, -torch.inf)  # (r, V)
        if ways.penalised:
            logits = penalise(logits, said, lanes.penalty)
        if not ways.random:
            return logits.argmax(-1)
        numbers = lanes.numbers.index_select(0, lanes.step)[0, :, None]
        chosen = sample(logits, lanes.temperature, lanes.top_p, numbers)
        return torch.where(lanes.random[:, 0] > 0, chosen, logits.argmax(-1)) if ways.greedy else chosen

    def _capture(self, step: Callable[[], None], lanes: DecodeBuffers) -> Callable[[], None]:
        """Record a step, after some on a stream of their own, where libraries make up their minds; all rows pause."""
        lanes.active.zero_()
        lanes.slot.fill_(self.cache.place.capacity - 1)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side), torch.no_grad():
            for _ in range(3):
                lanes.step.zero_()
                step()
        torch.cuda.current_stream().wait_stream(side)
        lanes.step.zero_()
        graph = torch.cuda.CUDAGraph()
        with torch.no_grad(), torch.cuda.graph(graph, pool=self._pool):
            step()
        return graph.replay


class DecodeBuffers:
    """Buffers of r rows that speak together; they stay where they are, as a CUDA graph needs.

    Attributes:
        whole: (5, r) row, slot, rotary position, whether it is active, and the token to be read.
        settings: (4 + piece, r) temperature, whether it was not 0, top_p, penalty, a number in [0, 1) for each step.
        tokens: (piece, r) chosen.
        states: (piece, r, D) that predict them.
        step: (1,) index in the piece.
    """

    def __init__(self, rows: int, piece: int, width: int, device: torch.device, dtype: torch.dtype) -> None:
        with torch.inference_mode(False):
            self.whole = torch.zeros(5, rows, dtype=torch.long, device=device)
            self.settings = torch.ones(4 + piece, rows, device=device)
            self.tokens = torch.zeros(piece, rows, dtype=torch.long, device=device)
            self.states = torch.zeros(piece, rows, width, dtype=dtype, device=device)
            self.step = torch.zeros(1, dtype=torch.long, device=device)
            self.rows, self.slot, self.position, self.active, self.token = self.whole
            self.temperature, self.random, self.top_p, self.penalty = self.settings[:4, :, None]
            self.counters, self.numbers = self.whole[1:3], self.settings[4:]


def visible(slots: Tensor, width: int, dtype: torch.dtype) -> Tensor:  # (r, 1, k, W)
    """What is added to the scores of attention: a token in slot s (r, k) sees the slots up to s."""
    hidden = torch.arange(width, device=slots.device) > slots[:, None, :, None]
    return torch.where(hidden, -torch.inf, 0.0).to(dtype)


def _compiled(backbone: Backbone, on_gpu: bool) -> Callable[..., Tensor]:
    """The LLM compiled for the shapes of a step, without CUDA graphs of the compiler's own.

    On a GPU it writes products with one row, and attention of one token, as sums that use the whole card: by
    coordinate descent and the plain formula (what gpt-fast does; yet to be measured here).
    """
    compiled = torch.compile(
        backbone.forward, dynamic=False, options={"coordinate_descent_tuning": True} if on_gpu else None
    )

    def run(*inputs: Any) -> Tensor:
        plain = sdpa_kernel(SDPBackend.MATH) if on_gpu else nullcontext()
        with plain, torch._dynamo.config.patch(recompile_limit=64):  # one for each number of rows and of slots
            return compiled(*inputs)

    return run

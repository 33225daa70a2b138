"""A whole step of guided denoising on buffers with fixed addresses, so that it can be one CUDA graph.

Letters: n steps, M kept predictions, B images, R guidance rows (B or 2B), Z latent channels, h and w latents, S width
of a step's time embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ..generators.denoising import DenoisingState
from ..kernels.guided_step import step_rows
from .precomputed import PrecomputedDenoiser

GRAPHS = 4  # buffers kept, for the sizes, batches and numbers of steps used last; each holds the memory of a step


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """All that the denoising of B images begins with.

    Args:
        latents: (B, Z, h, w), float32.
        time_embeddings: (n, 1 or R, S), see `Denoiser.constants`.
        cross_attention: tensors (R, ...), all unconditional rows first.
        rows: (n, 5 + M), see `kernels.guided_step.step_rows`; float32.
    """

    latents: Tensor
    time_embeddings: Tensor
    cross_attention: list[Tensor]
    rows: Tensor

    @classmethod
    def of(cls, states: Sequence[DenoisingState]) -> Inputs:
        """Join the states of images that begin together."""
        first = states[0]
        halves = range(first.cross_attention[0].shape[0])  # unconditional and conditional, or the latter alone
        cross_attention = [
            torch.cat([state.cross_attention[i][half : half + 1] for half in halves for state in states])
            for i in range(len(first.cross_attention))
        ]
        time_embeddings = first.time_embeddings  # (n, 1, S) is the same for all images, except per_image
        if time_embeddings.shape[1] > 1 or first.model.per_image:
            parts = [
                state.time_embeddings[:, half : half + 1]
                for half in range(time_embeddings.shape[1])
                for state in states
            ]
            time_embeddings = torch.cat(parts, dim=1)
        rows = step_rows(first.table, first.guidance).to(first.latents.device, torch.float32)
        return cls(
            latents=torch.cat([s.latents for s in states]),
            time_embeddings=time_embeddings,
            cross_attention=cross_attention,
            rows=rows,
        )

    def tensors(self) -> list[Tensor]:
        """Return all of them, in one order."""
        return [self.latents, self.time_embeddings, self.rows, *self.cross_attention]

    def key(self) -> tuple:
        """Return what buffers must agree in."""
        return tuple((tensor.shape, tensor.dtype, tensor.device) for tensor in self.tensors())

    def empty(self) -> Inputs:
        """Return buffers for such tensors, of zeros."""
        latents, time_embeddings, rows, *cross_attention = (torch.zeros_like(tensor) for tensor in self.tensors())
        return Inputs(latents=latents, time_embeddings=time_embeddings, rows=rows, cross_attention=cross_attention)


class Kind(NamedTuple):
    """What a step runs.

    Args:
        rows: R; or B, the conditional half alone.
        keeps: whether its deep feature is kept, see `precomputed.DeepCacheUNet`.
        takes: whether it takes the kept one.
    """

    rows: int
    keeps: bool = False
    takes: bool = False


class GraphedStep:
    """Model, guidance and sampler on buffers of their own: filled for each set of images, replayed for each step.

    The index of the step lies on the device, so every step of a kind is the same work, and nothing waits for the host.
    Each kind is a graph of its own, all on the same buffers. On a CPU the same code runs without graphs.

    Args:
        model: the denoiser.
        update: the fused guided step, see `kernels.guided_step`.
        like: inputs of the shapes and types that it will run with.
    """

    def __init__(self, model: PrecomputedDenoiser, update: Callable[..., None], like: Inputs) -> None:
        self.model, self.update = model, update
        rows, kept, shape = len(like.cross_attention[0]), like.rows.shape[1] - 5, like.latents.shape[1:]
        with torch.inference_mode(False):  # else the buffers could be written to in inference mode only
            self.inputs = like.empty()
            self.history = like.latents.new_zeros(kept, *like.latents.shape)
            self.step = torch.zeros(2, dtype=torch.int32, device=like.latents.device)
            batch = torch.zeros(rows, *shape, dtype=model.dtype, device=like.latents.device)
            self.batch = batch.contiguous(memory_format=model.layout)
            deep = torch.zeros(rows, model.deep, *shape[1:], dtype=model.dtype, device=like.latents.device)
            self.deep = deep.contiguous(memory_format=model.layout)
        self.replays: dict[Kind, Callable[[], None]] = {}
        # Graphs may share memory, as a step leaves nothing in it that another needs.
        self.pool = torch.cuda.graph_pool_handle() if like.latents.is_cuda else None

    def begin(self, inputs: Inputs, states: Sequence[DenoisingState]) -> None:
        """Fill the buffers for images before their first step."""
        for kind in {_kind(states, step) for step in range(len(states[0].table))}:  # recording works on the buffers
            if kind not in self.replays:
                self.replays[kind] = self._capture(kind) if self.pool else partial(self._advance, kind)
        for buffer, value in zip(self.inputs.tensors(), inputs.tensors(), strict=True):
            buffer.copy_(value)
        self.batch.copy_(inputs.latents.repeat(len(self.batch) // len(inputs.latents), 1, 1, 1))
        self.step.zero_()

    def advance(self, states: Sequence[DenoisingState]) -> None:
        """Run the next step, and give each state what it needs to go on alone: latents, history, deep feature."""
        step, kept, images = states[0].step, len(self.history), len(states)
        kind = _kind(states, step)
        self.replays[kind]()
        latents, history = self.inputs.latents.clone(), self.history.clone()
        deep = self.deep.clone() if kind.keeps else None
        for i, state in enumerate(states):
            state.latents = latents[i : i + 1]
            state.history = [history[(step - k) % kept, i : i + 1] for k in range(min(kept, step + 1))]
            state.step += 1
            if deep is not None:
                state.deep = deep[-kind.rows :][i::images]

    def _advance(self, kind: Kind) -> None:
        inputs, last = self.inputs, slice(-kind.rows, None)  # without guidance, the conditional half
        time_embedding = inputs.time_embeddings.index_select(0, self.step[:1])[0, last]
        batch, cross_attention = self.batch[last], [part[last] for part in inputs.cross_attention]
        prediction, deep = self.model(batch, time_embedding, cross_attention, self.deep[last] if kind.takes else None)
        if kind.keeps:
            self.deep[last].copy_(deep)
        self.update(inputs.latents, self.history, self.step, batch, prediction, inputs.rows)

    def _capture(self, kind: Kind) -> Callable[[], None]:
        """Record a step; before, it runs on another stream, where compilers and libraries choose their kernels."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side), torch.no_grad():
            for _ in range(3):
                self.step.zero_()
                self._advance(kind)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.no_grad(), torch.cuda.graph(graph, pool=self.pool):
            self._advance(kind)
        return graph.replay


class StepGraphs:
    """Graphed steps for images that begin together and go on together.

    Args:
        model, update: see GraphedStep.
    """

    def __init__(self, model: PrecomputedDenoiser, update: Callable[..., None]) -> None:
        self.model, self.update = model, update
        self.idle: dict[tuple, GraphedStep] = {}
        self.busy: dict[tuple[DenoisingState, ...], tuple[tuple, GraphedStep]] = {}

    @torch.no_grad()
    def advance(self, states: Sequence[DenoisingState]) -> bool:
        """Advance images by one step; False for those that neither begin together nor went on together until now."""
        group = tuple(states)
        for other in [key for key in self.busy if key != group and not set(group).isdisjoint(key)]:
            self._release(other)  # its images go on in other company
        if group in self.busy:
            _, step = self.busy[group]
        elif _alike(states):
            inputs = Inputs.of(states)
            weight = next(self.model.model.parameters())  # a graph reads weights at their addresses
            key = weight.data_ptr(), *inputs.key()
            step = self.idle.pop(key, None) or GraphedStep(self.model, self.update, inputs)
            step.begin(inputs, states)
            self.busy[group] = key, step
        else:
            return False
        step.advance(states)
        if states[0].done:
            self._release(group)
        while len(self.busy) > GRAPHS:  # of images that were given up
            self._release(next(iter(self.busy)))
        self._bound()
        return True

    def _release(self, group: tuple[DenoisingState, ...]) -> None:
        key, step = self.busy.pop(group)
        self.idle[key] = step
        self._bound()

    def _bound(self) -> None:
        while self.idle and len(self.idle) + len(self.busy) > GRAPHS:
            self.idle.pop(next(iter(self.idle)))


def _alike(states: Sequence[DenoisingState]) -> bool:
    first = states[0]
    same = (first.table, first.guidance, first.guided, first.reuse)
    return all(s.step == 0 and (s.table, s.guidance, s.guided, s.reuse) == same for s in states)


def _kind(states: Sequence[DenoisingState], step: int) -> Kind:
    first = states[0]
    rows = len(states) * (2 if step < first.guided else 1)
    return Kind(rows, keeps=first.reuse > 1 and step % first.reuse == 0, takes=step % first.reuse > 0)

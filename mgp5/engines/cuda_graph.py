"""A whole step of guided denoising on buffers with fixed addresses, so that it can be one CUDA graph.

Letters: n steps, M kept predictions, B images, R guidance rows (B or 2B), Z latent channels, h and w latents, S width
of a step's time embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ..device import record
from ..generators.denoising import DenoisingState
from ..kernels.guided_step import step_rows
from .precomputed import PrecomputedDenoiser

GRAPHS = 4  # buffers kept, for the sizes, batches and numbers of steps used last; each holds the memory of a step


class Kind(NamedTuple):
    """What a step runs: R rows, or B, the conditional half alone; whether it keeps its deep feature (see
    `precomputed.DeepCacheUNet`), and whether it takes the kept one."""

    rows: int
    keeps: bool
    takes: bool

    @classmethod
    def of(cls, states: Sequence[DenoisingState], step: int) -> Kind:
        first = states[0]
        rows = len(states) * (2 if step < first.guided else 1)
        return cls(rows, keeps=first.reuse > 1 and step % first.reuse == 0, takes=step % first.reuse > 0)


class GraphedStep:
    """Model, guidance and sampler on buffers of their own: filled for each set of images, replayed for each step.

    The index of the step lies on the device, so every step of a kind is the same work, and nothing waits for the host.
    Each kind is a graph of its own, all on the same buffers. On a CPU the same code runs without graphs. `update` is
    the fused guided step, see `kernels.guided_step`; `inputs` are those of images that it is made for, see `joined`.
    """

    def __init__(self, model: PrecomputedDenoiser, update: Callable[..., None], inputs: list[Tensor]) -> None:
        self.model, self.update, self.key = model, update, buffers_key(model, inputs)
        self.states: list[DenoisingState] = []  # empty while idle
        with torch.inference_mode(False):  # else the buffers could be written to in inference mode only
            self.inputs = [torch.zeros_like(tensor) for tensor in inputs]
            self.latents, self.time_embeddings, self.rows, *self.cross_attention = self.inputs
            kept, rows, shape = self.rows.shape[1] - 5, len(self.cross_attention[0]), self.latents.shape[1:]
            self.history = self.latents.new_zeros(kept, *self.latents.shape)
            self.step = torch.zeros(2, dtype=torch.int32, device=self.latents.device)
            batch = self.latents.new_zeros(rows, *shape, dtype=model.dtype)
            self.batch = batch.contiguous(memory_format=model.layout)
            deep = self.latents.new_zeros(rows, model.deep, *shape[1:], dtype=model.dtype)
            self.deep = deep.contiguous(memory_format=model.layout)
        self.replays: dict[Kind, Callable[[], None]] = {}
        # Graphs may share memory, as a step leaves nothing in it that another needs.
        self.pool = torch.cuda.graph_pool_handle() if self.latents.is_cuda else None

    def begin(self, states: list[DenoisingState], inputs: list[Tensor]) -> None:
        """Fill the buffers for images before their first step."""
        for kind in {Kind.of(states, step) for step in range(len(states[0].table))}:  # recording works on the buffers
            if kind not in self.replays:
                self.replays[kind] = self._capture(kind) if self.pool else partial(self._advance, kind)
        for buffer, value in zip(self.inputs, inputs, strict=True):
            buffer.copy_(value)
        self.batch.copy_(self.latents.repeat(len(self.batch) // len(self.latents), 1, 1, 1))
        self.step.zero_()
        self.states = states

    def advance(self) -> None:
        """Run the next step, and give each state what it needs to go on alone: latents, history, deep feature."""
        step, kept, images = self.states[0].step, len(self.history), len(self.states)
        kind = Kind.of(self.states, step)
        self.replays[kind]()
        latents, history = self.latents.clone(), self.history.clone()
        deep = self.deep.clone() if kind.keeps else None
        for i, state in enumerate(self.states):
            state.latents = latents[i : i + 1]
            state.history = [history[(step - k) % kept, i : i + 1] for k in range(min(kept, step + 1))]
            state.step += 1
            if deep is not None:
                state.deep = deep[-kind.rows :][i::images]

    def _advance(self, kind: Kind) -> None:
        last = slice(-kind.rows, None)  # without guidance, the conditional half
        time_embedding = self.time_embeddings.index_select(0, self.step[:1])[0, last]
        batch, cross_attention = self.batch[last], [part[last] for part in self.cross_attention]
        prediction, deep = self.model(batch, time_embedding, cross_attention, self.deep[last] if kind.takes else None)
        if kind.keeps:
            self.deep[last].copy_(deep)
        self.update(self.latents, self.history, self.step, batch, prediction, self.rows)

    def _capture(self, kind: Kind) -> Callable[[], None]:
        return record(partial(self._advance, kind), self.pool, self.step.zero_)[0]


class StepGraphs:
    """Graphed steps of a model for images that begin together and go on together."""

    def __init__(self, model: PrecomputedDenoiser, update: Callable[..., None]) -> None:
        self.model, self.update = model, update
        self.steps: list[GraphedStep] = []  # at most GRAPHS; the last one began last

    @torch.no_grad()
    def advance(self, states: Sequence[DenoisingState]) -> bool:
        """Advance images by one step; False for those that neither begin together nor went on together until now."""
        group = list(states)
        for step in self.steps:
            if step.states != group and not set(group).isdisjoint(step.states):
                step.states = []  # its images go on in other company
        step = next((step for step in self.steps if step.states == group), None)
        if step is None and not _alike(group):
            return False
        step = step or self._begin(group)
        step.advance()
        if group[0].done:
            step.states = []
        return True

    def _begin(self, states: list[DenoisingState]) -> GraphedStep:
        """Return a step whose buffers hold these images: an idle one that fits, or a new one for the oldest."""
        inputs = joined(states)
        key, idle = buffers_key(self.model, inputs), [step for step in self.steps if not step.states]
        step = next((step for step in idle if step.key == key), None)
        if step or len(self.steps) == GRAPHS:  # where all are busy, the first ones are with images that were given up
            self.steps.remove(step or [*idle, *self.steps][0])
        self.steps.append(step or GraphedStep(self.model, self.update, inputs))
        self.steps[-1].begin(states, inputs)
        return self.steps[-1]


def buffers_key(model: PrecomputedDenoiser, inputs: Sequence[Tensor]) -> tuple:
    """Return what images must agree in to use the same buffers."""
    weight = next(model.model.parameters())  # a graph reads weights at their addresses
    return weight.data_ptr(), *((tensor.shape, tensor.dtype, tensor.device) for tensor in inputs)


def joined(states: Sequence[DenoisingState]) -> list[Tensor]:
    """Join what the denoising of images begins with.

    Returns float32 latents (B, Z, h, w), time embeddings (n, 1 or R, S), the rows (n, 5 + M) of
    `kernels.guided_step.step_rows`, and the inputs of cross-attention (R, ...); all unconditional rows come first.
    """
    first, latents = states[0], torch.cat([state.latents for state in states])

    def halves(parts: Sequence[Tensor], axis: int) -> Tensor:
        rows = range(parts[0].shape[axis])
        return torch.cat([part.narrow(axis, row, 1) for row in rows for part in parts], dim=axis)

    time_embeddings = first.time_embeddings  # (n, 1, S) is the same for all images, except per_image
    if time_embeddings.shape[1] > 1 or first.model.per_image:
        time_embeddings = halves([state.time_embeddings for state in states], axis=1)
    rows = step_rows(first.table.coefficients, first.table.conversion, first.guidance)
    rows = rows.to(latents.device, torch.float32)
    parts = zip(*(state.cross_attention for state in states), strict=True)
    return [latents, time_embeddings, rows, *(halves(part, axis=0) for part in parts)]


def _alike(states: Sequence[DenoisingState]) -> bool:
    first = states[0]
    same = (first.table, first.guidance, first.guided, first.reuse)
    return all(s.step == 0 and (s.table, s.guidance, s.guided, s.reuse) == same for s in states)

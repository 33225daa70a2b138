"""A whole step of guided denoising on buffers that stay where they are, so that it can be one CUDA graph.

Letters: n steps, K predictions kept, B batch, R rows of the guidance batch (B or 2B), C, h and w of the latents, S
columns of a step's row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from .precomputed import PrecomputedDenoiser


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """All that a denoising starts with.

    Args:
        noise: (B, C, h, w), float32; becomes the latents.
        table: (n, 1 or R, S), see `PrecomputedDenoiser.constants`.
        context: see there too; each (R, ...).
        rows: (n, 5 + K), see `kernels.guided_step.step_rows`; float32.
    """

    noise: Tensor
    table: Tensor
    context: list[Tensor]
    rows: Tensor

    def tensors(self) -> list[Tensor]:
        """All of them, in one order."""
        return [self.noise, self.table, self.rows, *self.context]

    def key(self) -> tuple:
        """What buffers must agree in."""
        return tuple((tensor.shape, tensor.dtype, tensor.device) for tensor in self.tensors())

    def empty(self) -> Inputs:
        """Buffers for such tensors, of zeros."""
        noise, table, rows, *context = (torch.zeros_like(tensor) for tensor in self.tensors())
        return Inputs(noise=noise, table=table, rows=rows, context=context)


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
    """Model, guidance and sampler on buffers of their own: replayed for each step, filled anew for each image.

    The index of the step lies on the device, so every step of a kind is the same work, and nothing waits for the host.
    Each kind is a graph of its own, all on the same buffers. On a CPU the same code runs without graphs.

    Args:
        like: inputs of the shapes and types that it will run with.
    """

    def __init__(self, model: PrecomputedDenoiser, update: Callable[..., None], like: Inputs) -> None:
        self.model, self.update = model, update
        rows, keeps, shape = len(like.context[0]), like.rows.shape[1] - 5, like.noise.shape[1:]
        with torch.inference_mode(False):  # else the buffers could be written to in inference mode only
            self.inputs = like.empty()
            self.history = like.noise.new_zeros(keeps, *like.noise.shape)
            self.step = torch.zeros(2, dtype=torch.int32, device=like.noise.device)
            batch = torch.zeros(rows, *shape, dtype=model.dtype, device=like.noise.device)
            self.batch = batch.contiguous(memory_format=model.layout)
            deep = torch.zeros(rows, model.deep, *shape[1:], dtype=model.dtype, device=like.noise.device)
            self.deep = deep.contiguous(memory_format=model.layout)
        self.replays: dict[Kind, Callable[[], None]] = {}
        # Graphs may share memory, as a step leaves nothing in it that another needs.
        self.pool = torch.cuda.graph_pool_handle() if like.noise.is_cuda else None

    def run(self, inputs: Inputs, kinds: Sequence[Kind]) -> Iterator[Tensor]:
        """Yield the latents (B, C, h, w) after each step, one for each of `kinds`."""
        for kind in kinds:  # before the buffers are filled: recording works on them
            if kind not in self.replays:
                self.replays[kind] = self._capture(kind) if self.pool else partial(self._advance, kind)
        self._fill(inputs)
        for kind in kinds:
            self.replays[kind]()
            yield self.inputs.noise.clone()

    def _fill(self, inputs: Inputs) -> None:
        for own, given in zip(self.inputs.tensors(), inputs.tensors(), strict=True):
            own.copy_(given)
        self.batch.copy_(inputs.noise.repeat(len(self.batch) // len(inputs.noise), 1, 1, 1))
        self.step.zero_()

    def _advance(self, kind: Kind) -> None:
        own, last = self.inputs, slice(-kind.rows, None)  # without guidance, the conditional half
        row = own.table.index_select(0, self.step[:1])[0, last]
        batch, context = self.batch[last], [part[last] for part in own.context]
        prediction, deep = self.model(batch, row, context, self.deep[last] if kind.takes else None)
        if kind.keeps:
            self.deep[last].copy_(deep)
        self.update(own.noise, self.history, self.step, batch, prediction, own.rows)

    def _capture(self, kind: Kind) -> Callable[[], None]:
        """Record a step; before, it runs on a stream of its own, where compilers and libraries make up their minds."""
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

"""Buffers whose addresses stay, as CUDA graphs need.

Letters: r rows, k tokens of a run, n tokens decoded per sync, D LLM width, E embedding width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


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

    def pause(self, slot: int) -> None:
        """Let all rows write to a slot that nothing reads, and begin again."""
        self.active.zero_()
        self.slot.fill_(slot)
        self.step.zero_()


class RunBuffers:
    """What r rows read in one forward of k tokens each, and what came of it."""

    def __init__(self, inputs: tuple[Tensor, ...], work: Callable[..., tuple[Tensor, ...]]) -> None:
        with torch.inference_mode(False):
            self.inputs = tuple(torch.empty_like(tensor) for tensor in inputs)
        self.work, self.results = work, ()
        self.load(inputs)

    def load(self, inputs: tuple[Tensor, ...]) -> None:
        """Copy inputs of the same shapes into the buffers."""
        for buffer, tensor in zip(self.inputs, inputs, strict=True):
            buffer.copy_(tensor)

    def __call__(self) -> None:
        """Do the work on the buffers; the results stay where a graph leaves them."""
        self.results = self.work(*self.inputs)

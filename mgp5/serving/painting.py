"""Pictures of different requests, at steps of their own, denoised in one call of the model.

Letters: B pictures, n steps, K predictions kept, R rows of a call (two of a picture that has guidance), C, h and w of
latents, L and D of a condition, S columns of a step's row.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..generators.sampler import SamplerTable, guidance_batch, linear_update, sampler_table

if TYPE_CHECKING:
    from ..generators.latent_diffusion import FrozenDiffusion
    from ..heads.minigpt5 import MiniGPT5Head
    from ..inference.scheduler import Paint


@dataclass(eq=False)
class Canvas:
    """A picture that is being drawn.

    Args:
        latents: (1, C, h, w), float32.
        table: of its sampler.
        times: (n, 1 or r, S), see `PrecomputedDenoiser.constants`; without an engine its timesteps, (n, 1, 1).
        context: see there too, each (r, ...); without an engine the condition, (r, L, D). r is 2 with guidance, else 1.
        guidance: scale.
        guided: how many steps have guidance, the first.
    """

    latents: Tensor
    table: SamplerTable
    times: Tensor
    context: list[Tensor]
    guidance: float
    guided: int
    step: int = 0
    history: list[Tensor] = field(default_factory=list)  # at most K of (1, C, h, w), newest first
    pixels: Tensor | None = None  # (3, H, W), once it is decoded

    @property
    def rows(self) -> int:
        """How many rows of the next call are its own."""
        return 2 if self.step < self.guided else 1

    @property
    def done(self) -> bool:
        """Whether the latents are the result."""
        return self.step == len(self.table)

    def advance(self, prediction: Tensor) -> None:
        """Take a prediction (r, C, h, w), the unconditional half first, by the coefficients of its own step."""
        coefficients, conversion = self.table.coefficients[self.step], self.table.conversion[self.step]
        self.latents, kept = linear_update(
            self.latents, prediction, self.history, coefficients.tolist(), conversion.tolist(), self.guidance
        )
        self.history = [kept, *self.history][: self.table.history]
        self.step += 1


Members = tuple[tuple[Canvas, int], ...]  # pictures of one call, and the rows of each


def _members(group: list[Canvas]) -> Members:
    return tuple((canvas, canvas.rows) for canvas in group)


class StepBatch:
    """Draws pictures that begin and end at any time: `step` advances each by one step of its own.

    A picture is what `FrozenDiffusion.draw` makes of it alone, within rounding. Engines run here without CUDA graphs,
    whose shapes would change with every picture that comes or goes.

    Args:
        workers: calls at a time, each of a share of the pictures. For a CPU: of small models, threads of their own use
            its cores better than threads within an operation.
    """

    def __init__(self, head: MiniGPT5Head, workers: int = 1) -> None:
        self.head, self.workers = head, workers
        self._pool = ThreadPoolExecutor(workers)
        self._contexts: dict[Members, list[Tensor]] = {}  # of the groups of the last step

    @property
    def diffusion(self) -> FrozenDiffusion:
        """What draws."""
        return self.head.diffusion

    @torch.no_grad()
    def begin(self, paint: Paint) -> Canvas:
        """A picture before its first step. Raises Mgp5Error for a size, sampler or number of steps that cannot be."""
        diffusion, options = self.diffusion, paint.options.image
        table = sampler_table(options.sampler, diffusion.schedule, options.steps)
        size = diffusion.native_size
        shape = diffusion.latent_shape(options.height or size, options.width or size)
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(paint.seed))[None].to(diffusion.device)
        guided = round(options.guidance_until * len(table)) if options.guidance != 1.0 else 0
        unconditional = self.head.unconditional(paint.condition) if guided else None
        batch = guidance_batch(paint.condition, unconditional, options.guidance)
        times, context = table.timesteps.to(noise.device, torch.float32), [batch]
        if diffusion.engine:
            self._enter()
            times, context = diffusion.engine.model.constants(times, batch)
        else:
            times = times[:, None, None]
        return Canvas(noise * table.noise_scale, table, times, context, options.guidance, guided)

    @torch.no_grad()
    def step(self, canvases: Collection[Canvas], meanwhile: Callable[[], bool] = lambda: False) -> int:
        """One step of each; one whose steps are done is decoded. Returns the number of calls of the denoiser: one for
        each size, with one worker.

        Args:
            meanwhile: called again and again while several workers are busy, until it says False.
        """
        groups: dict[torch.Size, list[Canvas]] = {}
        done = [canvas for canvas in canvases if canvas.done]
        for canvas in canvases:
            if not canvas.done:
                groups.setdefault(canvas.latents.shape, []).append(canvas)
        shares = -(-self.workers // max(1, len(groups)))
        calls = [group[i::shares] for group in groups.values() for i in range(min(shares, len(group)))]
        self._contexts = {key: self._context(key) for key in map(_members, calls)}
        work = [partial(self._predict, call) for call in calls] + [partial(self._finish, canvas) for canvas in done]
        for call, prediction in zip(calls, self._all(work, meanwhile), strict=False):
            for canvas, own in zip(call, prediction.split([canvas.rows for canvas in call]), strict=True):
                canvas.advance(own)
        return len(calls)

    def _all(self, work: list[Callable[[], Tensor]], meanwhile: Callable[[], bool]) -> list[Tensor]:
        if self.workers == 1:
            return [part() for part in work]
        made = [self._pool.submit(torch.inference_mode()(part)) for part in work]  # the mode is of a thread
        while not all(future.done() for future in made) and meanwhile():
            pass
        return [future.result() for future in made]

    def _finish(self, canvas: Canvas) -> Tensor:  # (3, H, W)
        (canvas.pixels,) = self.head.finish(canvas.latents)
        return canvas.pixels

    def _predict(self, group: list[Canvas]) -> Tensor:  # (R, C, h, w)
        self._enter()
        latents = torch.cat([canvas.latents.expand(canvas.rows, -1, -1, -1) for canvas in group])
        rows = [canvas.times[canvas.step, -canvas.rows :] for canvas in group]
        rows = [row.expand(canvas.rows, -1) for row, canvas in zip(rows, group, strict=True)]
        engine, context = self.diffusion.engine, self._contexts[_members(group)]
        if engine is None:
            return self.diffusion.predict(latents, torch.cat(rows)[:, 0], context[0])
        first = group[0]
        alike = all((canvas.table, canvas.step) == (first.table, first.step) for canvas in group)
        row = first.times[first.step] if alike and first.times.shape[1] == 1 else torch.cat(rows)
        return engine.model(latents, row, context)[0]

    def _context(self, members: Members) -> list[Tensor]:
        """The contexts of a group, side by side; made anew when a picture comes or goes, or its guidance ends."""
        if members in self._contexts:
            return self._contexts[members]
        parts = zip(*([part[-rows:] for part in canvas.context] for canvas, rows in members), strict=True)
        return [torch.cat(part) for part in parts]

    def _enter(self) -> None:
        if placement := self.diffusion.placement:
            placement.enter("draw")

"""How long a guided image takes by each engine and by diffusers' own pipeline: the same weights, condition and noise.

Letters: L length and D width of the condition, C, h and w of the latents.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from torch import Tensor

from ..diffusion.sd2 import StableDiffusion
from . import Backend, apply, remove

Row = dict[str, Any]


def bench_denoise(
    name: str,
    backends: Sequence[Backend] = ("eager",),
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    steps: int = 20,
    guidance: float = 7.5,
    images: int = 15,
) -> Iterator[Row]:
    """One row for each way to draw an image from a condition, by turns, after one image that is not timed.

    Args:
        name: folder or hub id of a StableDiffusionPipeline.
        images: to time for each provider.

    Yields rows of `mgp5 bench`: ms per image with VAE; `first_s` of the first image, which compiles; `psnr` in dB
    against the pipeline's picture, whose pixels are in [0, 1].
    """
    pipeline = StableDiffusionPipeline.from_pretrained(name, dtype=dtype, safety_checker=None).to(device)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    pipeline.set_progress_bar_config(disable=True)
    ours = {backend: StableDiffusion.load(name, dtype).to(device) for backend in backends}
    first = next(iter(ours.values()))
    generator = torch.Generator().manual_seed(0)
    condition = torch.randn(2, *first.condition_shape, generator=generator).to(device, dtype)  # (2, L, D)
    providers: dict[str, Callable[[], Tensor]] = {
        "diffusers": lambda: _by_pipeline(pipeline, condition, steps=steps, guidance=guidance)
    }
    for backend, diffusion in ours.items():
        apply(diffusion, backend)
        providers[backend] = lambda diffusion=diffusion: _by_us(diffusion, condition, steps=steps, guidance=guidance)
    pictures, started = {}, {}
    for provider, draw in providers.items():
        started[provider], pictures[provider] = _timed(draw)
    times: dict[str, list[float]] = {provider: [] for provider in providers}
    for _ in range(images):
        for provider, draw in providers.items():
            times[provider].append(_timed(draw)[0])
    for diffusion in ours.values():
        remove(diffusion)
    for provider, seconds in times.items():
        marks = torch.tensor(seconds, dtype=torch.float64).quantile(torch.tensor([0.5, 0.2, 0.8]).double()) * 1000
        error = float((pictures[provider] - pictures["diffusers"]).square().mean())
        yield {
            "name": "guided image",
            "size": f"{first.native_size} px, {steps} steps",
            "provider": provider,
            **dict(zip(("median", "p20", "p80"), (round(float(mark), 2) for mark in marks), strict=True)),
            "unit": "ms",
            "first_s": round(started[provider], 2),
            "psnr": round(-10 * math.log10(error), 1) if error else None,
        }


@torch.inference_mode()
def _by_pipeline(
    pipeline: StableDiffusionPipeline, condition: Tensor, *, steps: int, guidance: float
) -> Tensor:  # (1, 3, H, W) in [0, 1]
    return pipeline(
        prompt_embeds=condition[1:],
        negative_prompt_embeds=condition[:1],
        num_inference_steps=steps,
        guidance_scale=guidance,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
    ).images


@torch.inference_mode()
def _by_us(diffusion: StableDiffusion, condition: Tensor, *, steps: int, guidance: float) -> Tensor:  # (1, 3, H, W)
    settings = {"steps": steps, "guidance": guidance, "sampler": "ddim"}
    generators = [torch.Generator().manual_seed(0)]
    *_, latents = diffusion.draw(condition[1:], condition[:1], generators=generators, **settings)
    return diffusion.decode(latents) / 2 + 0.5


def _timed(draw: Callable[[], Tensor]) -> tuple[float, Tensor]:
    """Seconds, and the picture on the CPU: which waits for the device."""
    began = time.perf_counter()
    picture = draw().float().cpu()
    return time.perf_counter() - began, picture

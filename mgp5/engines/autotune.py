"""Find the fastest engine that is right on this GPU: a few steps by each, compared with the first, once per machine.

Letters: Z latent channels, h and w latents.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from importlib.metadata import version

import torch
from torch import Tensor

from ..device import user_cache
from ..errors import Mgp5Error
from ..files import Claim, digest, read_json, write_json
from ..generators.latent_diffusion import LatentDiffusion
from .engine import Engine

STEPS = 6
TRUSTED = 0.05  # relative error of the latents after these steps: rounding to bfloat16 stays well below


def fastest(candidates: dict[str, Callable[[], Tensor]]) -> tuple[str, str]:
    """Return the name of the fastest candidate whose latents equal those of the first, and why it was chosen.

    Each is called twice, as the first call compiles and records CUDA graphs. What the first candidate raises passes.
    """
    reference, seconds, refused = None, {}, []
    for name, draw in candidates.items():
        try:
            draw()
            began = time.perf_counter()
            latents = draw().float().cpu()  # waits for the device
            spent = time.perf_counter() - began
        except Exception as error:  # whatever a compiler or a driver raises: this candidate does not work here
            if reference is None:
                raise
            refused.append(f"{name} failed ({str(error).strip().partition(chr(10))[0] or type(error).__name__})")
            continue
        reference = latents if reference is None else reference
        difference = float((latents - reference).norm() / reference.norm())
        if difference <= TRUSTED:  # False for NaN
            seconds[name] = spent
        else:
            refused.append(f"{name} draws something else (relative difference {difference:.2g})")
    times = ", ".join(f"{name} {1000 * spent / STEPS:.1f}" for name, spent in seconds.items())
    return min(seconds, key=seconds.get), "; ".join([f"the fastest here (ms a step: {times})", *refused])


def fastest_engine(generator: LatentDiffusion, names: tuple[str, ...]) -> tuple[str, str]:
    """Return `fastest` of the named engines for one guided image of native size, remembered in the user's cache.

    The generator has no engine afterwards.
    """
    key, path, results = _key(generator, names), user_cache() / "engines.json", {}
    with suppress(Mgp5Error):  # the file only saves time
        results = read_json(path)
    if key not in results:
        try:
            results[key] = list(fastest({name: partial(_draw, generator, name) for name in names}))
        finally:
            generator.engine = None
        with suppress(Mgp5Error), Claim(path, beside=True):  # another process may be writing there
            write_json(path, results)
    name, why = results[key]
    return name, why


def _draw(generator: LatentDiffusion, name: str) -> Tensor:  # (1, Z, h, w)
    if generator.engine is None or generator.engine.name != name:
        generator.engine = Engine(name, generator.denoiser)
    condition = torch.randn(2, *generator.condition_shape, generator=torch.Generator().manual_seed(0))
    condition = condition.to(generator.device, generator.denoiser.dtype)
    *_, latents = generator.draw(
        condition[:1], condition[1:], steps=STEPS, guidance=7.5, generators=[torch.Generator().manual_seed(0)]
    )
    return latents


def _key(generator: LatentDiffusion, names: tuple[str, ...]) -> str:
    """Return a hash of all that the result depends on."""
    denoiser = generator.denoiser
    card = torch.cuda.get_device_properties(denoiser.device).name if denoiser.device.type == "cuda" else "cpu"
    libraries = [f"{name} {version(name)}" for name in ("torch", "diffusers", "mgp5")]
    config = {name: value for name, value in denoiser.config.items() if name[0] != "_"}  # without where it lies
    model = type(denoiser).__name__, str(denoiser.dtype), config
    return digest([card, *libraries, *model, *names], size=8)

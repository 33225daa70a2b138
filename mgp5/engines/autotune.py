"""The fastest engine that is right on this GPU: a few steps by each, compared with the plainest, once per machine.

Letters: B images, C, h and w of the latents.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..device import user_cache
from ..errors import Mgp5Error
from ..files import digest, lock, read_json, write_json

if TYPE_CHECKING:
    from ..generators.latent_diffusion import LatentDiffusion

STEPS = 6
TRUSTED = 0.05  # relative error of the latents after these steps: rounding to bfloat16 stays well below


def fastest(ways: dict[str, Callable[[], Tensor]]) -> tuple[str, str]:
    """Which way is fastest of those whose result is that of the first, and a sentence that says why.

    Args:
        ways: each draws the same latents (B, C, h, w); called twice, as the first call compiles and captures.
    """
    plain = next(iter(ways))
    reference, seconds, refused = None, {}, []
    for name, draw in ways.items():
        try:
            draw()
            began = time.perf_counter()
            latents = draw().float().cpu()  # waits for the device
            spent = time.perf_counter() - began
        except Exception as error:  # whatever a compiler or a driver raises: this way does not work here
            if name == plain:
                raise
            refused.append(f"{name} failed ({str(error).strip().partition(chr(10))[0] or type(error).__name__})")
            continue
        reference = latents if reference is None else reference
        difference = float((latents - reference).norm() / reference.norm())
        if difference <= TRUSTED:  # not for NaN
            seconds[name] = spent
        else:
            refused.append(f"{name} draws something else (relative difference {difference:.2g})")
    best = min(seconds, key=seconds.get)
    times = ", ".join(f"{name} {1000 * spent / STEPS:.1f}" for name, spent in seconds.items())
    return best, "; ".join([f"the fastest here (ms a step: {times})", *refused])


def try_out(diffusion: LatentDiffusion, names: tuple[str, ...]) -> tuple[str, str]:
    """`fastest` of the named engines for one guided image of native size; remembered in the user's cache."""
    from . import remove

    key, memory = _key(diffusion, names), _file()
    known = _read(memory)
    if key not in known:
        try:
            known[key] = list(fastest(dict(_mode(diffusion, names))))
        finally:
            remove(diffusion)
        with suppress(Mgp5Error), lock(memory.with_suffix(".lock")):  # another process may be writing there
            write_json(memory, known)
    best, why = known[key]
    return best, why


def _mode(diffusion: LatentDiffusion, names: tuple[str, ...]) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    from . import Engine, remove

    length, width = diffusion.condition_shape
    numbers = torch.Generator().manual_seed(0)
    condition = torch.randn(2, length, width, generator=numbers).to(diffusion.device, diffusion.denoiser.dtype)

    def draw(name: str) -> Tensor:
        if diffusion.engine is None or diffusion.engine.name != name:
            remove(diffusion)
            diffusion.engine = Engine(name, diffusion.denoiser)
        *_, latents = diffusion.draw(
            condition[:1], condition[1:], steps=STEPS, guidance=7.5, generators=[torch.Generator().manual_seed(0)]
        )
        return latents

    for name in names:
        yield name, lambda name=name: draw(name)


def _key(diffusion: LatentDiffusion, names: tuple[str, ...]) -> str:
    """All that the answer depends on: the card, the libraries, the model's shape and type."""
    denoiser = diffusion.denoiser
    card = torch.cuda.get_device_properties(denoiser.device).name if denoiser.device.type == "cuda" else "cpu"
    libraries = [f"{name} {version(name)}" for name in ("torch", "diffusers", "mgp5")]
    shape = json.dumps(dict(denoiser.config), sort_keys=True, default=str)
    facts = [card, *libraries, type(denoiser).__name__, str(denoiser.dtype), shape, *names]
    return digest(facts, size=8)


def _file() -> Path:
    return user_cache() / "engines.json"


def _read(path: Path) -> dict[str, list[str]]:
    """What was found before; a file that cannot be read is as none, for it only saves time."""
    try:
        return read_json(path)
    except Mgp5Error:
        return {}

"""Denoisers exported into the user's cache, for the ONNX engine of a CPU: on request, once for each set of weights."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import torch

from .. import engines
from ..device import limit_threads_for_small_models, user_cache
from ..engines import Backend, BackendChoice
from ..engines.engine import packing_pays
from ..engines.exported import load_engine, weights_hash
from ..errors import Mgp5Error
from ..files import Claim, GiB, digest, remove_folder
from ..generators import load_generator
from ..generators.latent_diffusion import LatentDiffusion
from ..hub import resolve
from .request import NEEDED, ExportRequest, missing

VERSION = 2  # of what is exported: to be raised when our own modules compute something else, or faster
LIMIT = 4 * GiB  # of what is kept
TINY = 1_000_000  # parameters; a denoiser below draws at once anyway


def apply(generator: LatentDiffusion, backend: Backend = "auto", exported: Path | None = None) -> BackendChoice:
    """Attach an engine as `engines.apply` does, which for `onnx` is that of the cache; for `auto` too, if it is there.
    An `exported` folder takes the place of the cache. Raises as `engines.apply` and `cached_denoiser` do."""
    note, denoiser = "", generator.denoiser
    if not exported and (backend == "onnx" or (backend == "auto" and export_pays(generator))):
        try:
            engines.select_backend("onnx", denoiser.device, denoiser.dtype)
            if folder := cached_denoiser(generator, make=backend == "onnx"):
                engines.remove(generator)
                generator.engine = load_engine(generator, folder, "onnx", same_weights=True)
                return BackendChoice("onnx", "" if backend == "onnx" else "by ONNX Runtime, the fastest on a CPU")
            note = "; mgp5 export --cache, once with this --model, makes it faster"
        except Mgp5Error as error:
            if backend == "onnx":
                raise
            note = f" (not onnx: {error})"
    choice = engines.apply(generator, backend, exported)
    return replace(choice, why=choice.why + note)


def export_pays(generator: LatentDiffusion) -> bool:
    """Return whether an exported denoiser is faster: on a CPU, neither tiny nor so large that it gains little."""
    size = sum(p.numel() for p in generator.denoiser.parameters())
    return packing_pays(generator.denoiser) and size > TINY and not missing()


def fill(model: str, tell: Callable[[str], None]) -> None:
    """Export what `auto` draws by on a CPU into the cache, if it is not there. Raises as `cached_denoiser` does."""
    generator = load_generator(resolve(model).diffusion, torch.float32)
    limit_threads_for_small_models(generator)
    if not export_pays(generator):
        tell("--backend auto does not take it: the denoiser is tiny, or too large to gain")
    tell(f"kept for this denoiser: {cached_denoiser(generator)}")


def empty(tell: Callable[[str], None]) -> None:
    """Remove all that is in the cache."""
    folder = user_cache() / "onnx"
    size = _bytes(folder)
    if folder.is_dir():
        remove_folder(folder)
    tell(f"{size / 1e6:.0f} MB removed from {folder}")


def cached_denoiser(generator: LatentDiffusion, make: bool = True) -> Path | None:
    """Return the folder of a generator's denoiser and VAE decoder; without one, export it (stderr says so), or None.

    Raises Mgp5Error if the generator is not on the CPU in float32, packages are missing, the folder cannot be written,
    another process exports the same, or the files compute something else.
    """
    denoiser, root = generator.denoiser, user_cache() / "onnx"
    if not make and not root.is_dir():
        return None  # hashes of weights take time
    if denoiser.device.type != "cpu" or denoiser.dtype != torch.float32:
        hint = "export it: mgp5 export --onnx --split --precision fp16, and give --exported DIR"
        raise Mgp5Error(f"nothing is exported for {denoiser.device.type} by itself", hint, usage=True)
    if reason := missing():
        raise Mgp5Error("the denoiser cannot be exported", reason)
    config = {name: value for name, value in denoiser.config.items() if name[0] != "_"}  # without where it lies
    key = {"version": VERSION, "config": config}
    key |= {"versions": {name: version(name) for name in ("mgp5", "torch", "diffusers", *NEEDED)}}
    key |= {"denoiser": weights_hash(denoiser), "vae": weights_hash(generator.vae)}
    folder = root / digest(key)
    if not (folder / "manifest.json").is_file():
        if not make:
            return None
        with Claim(folder, beside=True):
            if not (folder / "manifest.json").is_file():  # else another process has just made it
                _export(generator, folder)
        _trim(root, folder)
    with suppress(OSError):
        os.utime(folder)  # when it was used last
    return folder


def _export(generator: LatentDiffusion, folder: Path) -> None:
    from .components import Exportable
    from .run import write_export

    sys.stderr.write(f"exporting the denoiser to ONNX, once: it is kept in {folder}\n")
    components = "denoiser", "vae_decoder"
    request = ExportRequest(onnx=True, out=folder, components=components, split=True, image=False)
    write_export(Exportable(name="its own weights", generator=generator), request, folder)


def _trim(root: Path, made: Path) -> None:
    """Remove the exports that were not used for longest, until what is left takes at most LIMIT bytes."""
    left = LIMIT - _bytes(made)
    others = (folder for folder in root.iterdir() if folder != made and folder.is_dir() and folder.name[0] != ".")
    for folder in sorted(others, key=lambda folder: folder.stat().st_mtime, reverse=True):
        if (left := left - _bytes(folder)) < 0:
            remove_folder(folder)


def _bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())

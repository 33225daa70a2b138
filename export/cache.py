"""Denoisers exported into the user's cache, for the ONNX engine of a CPU: written once for each set of weights."""

from __future__ import annotations

import sys
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from .. import engines
from ..device import user_cache
from ..engines import Backend, BackendChoice
from ..engines.engine import packing_pays
from ..engines.exported import load_engine, weights_hash
from ..errors import Mgp5Error
from ..files import digest
from .request import NEEDED, ExportRequest, missing

if TYPE_CHECKING:
    from ..generators.latent_diffusion import LatentDiffusion

VERSION = 2  # of what is exported: to be raised when our own modules compute something else, or faster
TINY = 1_000_000  # parameters; a denoiser below draws at once anyway


def apply(generator: LatentDiffusion, backend: Backend = "auto", exported: Path | None = None) -> BackendChoice:
    """Attach an engine as `engines.apply` does, which for `onnx`, and for `auto` where it pays, is that of the cache.

    An `exported` folder takes the place of the cache. Raises as `engines.apply` and `cached_denoiser` do.
    """
    note, denoiser = "", generator.denoiser
    if not exported and (backend == "onnx" or (backend == "auto" and export_pays(generator))):
        try:
            engines.select_backend("onnx", denoiser.device, denoiser.dtype)
            engines.remove(generator)
            generator.engine = load_engine(generator, cached_denoiser(generator), "onnx", same_weights=True)
            return BackendChoice("onnx", "" if backend == "onnx" else "by ONNX Runtime, the fastest on a CPU")
        except Mgp5Error as error:
            if backend == "onnx":
                raise
            note = f" (not onnx: {error})"
    choice = engines.apply(generator, backend, exported)
    return replace(choice, why=choice.why + note)


def export_pays(generator: LatentDiffusion) -> bool:
    """Return whether `auto` exports a denoiser: on a CPU, neither tiny nor so large that it gains little."""
    size = sum(p.numel() for p in generator.denoiser.parameters())
    return packing_pays(generator.denoiser) and size > TINY and not missing()


def cached_denoiser(generator: LatentDiffusion) -> Path:
    """Return the folder of a generator's denoiser and VAE decoder, exported first (stderr says so) if there is none.

    Raises Mgp5Error if the generator is not on the CPU in float32, packages are missing, the folder cannot be written,
    or the files compute something else.
    """
    denoiser = generator.denoiser
    if denoiser.device.type != "cpu" or denoiser.dtype != torch.float32:
        hint = "export it: mgp5 export --onnx --split --precision fp16, and give --exported DIR"
        raise Mgp5Error(f"nothing is exported for {denoiser.device.type} by itself", hint, usage=True)
    if reason := missing():
        raise Mgp5Error("the denoiser cannot be exported", reason)
    key = {"version": VERSION, "config": dict(denoiser.config)}
    key |= {"versions": {name: version(name) for name in ("mgp5", "torch", "diffusers", *NEEDED)}}
    key |= {"denoiser": weights_hash(denoiser), "vae": weights_hash(generator.vae)}
    folder = user_cache() / "onnx" / digest(key)
    if not (folder / "manifest.json").is_file():
        from .components import Exportable
        from .run import write_export

        sys.stderr.write(f"exporting the denoiser to ONNX, once: it is kept in {folder}\n")
        components = "denoiser", "vae_decoder"
        request = ExportRequest(onnx=True, out=folder, components=components, split=True, image=False)
        try:
            write_export(Exportable(name="its own weights", generator=generator), request, folder)
        except Mgp5Error:
            if not (folder / "manifest.json").is_file():  # else another process was faster
                raise
    return folder

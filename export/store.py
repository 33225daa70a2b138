"""The user's own store of exported denoisers, for the engine that needs one: written once for each set of weights."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ..device import user_cache
from ..errors import Mgp5Error
from ..files import digest
from .job import Request, export
from .manifest import versions, weights_hash
from .subject import Subject

if TYPE_CHECKING:
    from ..generators.latent_diffusion import LatentDiffusion

COMPONENTS = ("denoiser", "vae_decoder")
VERSION = 2  # of what is exported: to be raised when our own modules compute something else, or faster


def stored(diffusion: LatentDiffusion) -> Path:
    """The folder of a diffusion model on the CPU in float32; exported first where it is not there, stderr says so.

    Raises:
        Mgp5Error: it cannot be exported or written, or the files are not right.
    """
    facts = {"version": VERSION, "versions": versions(), "config": dict(diffusion.denoiser.config)}
    facts |= {"denoiser": weights_hash(diffusion.denoiser), "vae": weights_hash(diffusion.vae)}
    folder = user_cache() / "onnx" / digest(facts)
    if not (folder / "manifest.json").is_file():
        sys.stderr.write(f"exporting the denoiser to ONNX, once: it is kept in {folder}\n")
        request = Request(components=COMPONENTS, split=True, image=False)
        try:
            export(Subject(name="its own weights", diffusion=diffusion), request, folder)
        except Mgp5Error:
            if not (folder / "manifest.json").is_file():  # else another process was faster
                raise
    return folder

"""How a model is held in memory: bits of the LLM, offloading, tiles of the VAE."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Any

from ..backbones.quantization import Quantize
from ..errors import Mgp5Error
from ..options import Backend

TILE = 64  # latents along a side: in smaller tiles it shows that each is normalised on its own


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How a model is held in memory.

    Args:
        quantize: bits of the LLM's layers.
        offload: parts wait in the computer's memory until their phase.
        tiling: the VAE decodes images above 64 latents (512 pixels of Stable Diffusion) in tiles, which changes them a
            little, as each is normalised on its own.
        why: one line for the user, or "".
    """

    quantize: Quantize = "none"
    offload: bool = False
    tiling: bool = False
    why: str = ""

    @property
    def moves_llm(self) -> bool:
        """Whether the LLM waits too. Layers of 8 bits keep tensors that bitsandbytes does not move before 0.48."""
        return self.offload and self.quantize != "8bit"

    @property
    def name(self) -> str:
        """The plan in words."""
        bits = [] if self.quantize == "none" else [f"LLM in {self.quantize[0]} bits"]
        return ", ".join(bits + ["offload"] * self.offload + ["VAE tiling"] * self.tiling) or "full"

    def engine(self, backend: Backend | None) -> Backend | None:
        """Return the engine that goes with the plan.

        Raises:
            Mgp5Error: `backend` needs weights to stay where they are.
        """
        if self.offload and backend not in (None, "auto", "eager"):
            raise Mgp5Error(
                f"--backend {backend} needs weights that stay on the GPU, and this memory mode moves them",
                "take --backend eager, or --memory full",
                usage=True,
            )
        return "eager" if self.offload and backend == "auto" else backend


def memory_plans(quantize: Quantize = "none") -> list[Plan]:
    """Return all plans, from the one that takes most memory and least time."""
    bits: list[Quantize] = ["none", "4bit"] if quantize == "none" else [quantize]
    choices = product(bits, (False, True), (False, True))
    return [Plan(quantize=kind, offload=offload, tiling=tiling) for kind, offload, tiling in choices]


def tile_vae(generator: Any) -> None:
    """Let the VAE decode large images in overlapping tiles."""
    vae, size = generator.vae, generator.native_size
    vae.enable_tiling()
    vae.tile_sample_min_size = TILE * (size // generator.latent_shape(size, size)[1])
    vae.tile_latent_min_size = TILE

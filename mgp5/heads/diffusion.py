"""The base class of heads that draw with a latent-diffusion model.

Letters: L condition length, C condition width, H and W pixels, Z latent channels, h and w latents.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor

from ..generators.latent_diffusion import LatentDiffusion
from . import DrawContext, Head, Part, Preview, Request, Response, Step

if TYPE_CHECKING:
    from ..generators.denoising import DenoisingState
    from ..options import DiffusionOptions


class DiffusionHead(Head):
    """Denoise step by step from a condition that a subclass makes."""

    generator: LatentDiffusion
    residuals: ClassVar[bool] = False  # whether the head adds to what the denoiser computes inside
    _unconditional: Tensor | None = None  # kept

    @property
    def device(self) -> torch.device:
        """Return the device of the generator."""
        return self.generator.device

    @property
    def description(self) -> str:
        """Return class, prediction type and condition shape of the generator, as text."""
        length, width = self.generator.condition_shape
        return f"{type(self.generator).__name__} {self.generator.schedule.prediction_type} {length}x{width}"

    def generator_parts(self) -> dict[str, Part]:
        """Return the frozen parts of the generator; encoders are there where a stage or an image needs them."""
        return {
            "denoiser": Part(self.generator.denoiser, "draw", False),
            "VAE": Part(self.generator.vae, "decode", False),
        } | {
            name.replace("_", " "): Part(module, "", False)
            for name, module in self.generator.named_children()
            if name.startswith("text_encoder") or name == "image_encoder"
        }

    def cached_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of "moments" of latents (2Z, h, w), and of "encodings" of captions (L, C)."""
        channels, *latents = self.generator.latent_shape(*(self.generator.native_size,) * 2)
        return {"moments": (2 * channels, *latents), "encodings": self.generator.condition_shape}

    def make_unconditional(self) -> Tensor:  # (1, L, C)
        """Compute the unconditional condition."""
        raise NotImplementedError

    def unconditional(self, condition: Tensor) -> Tensor:  # (1, L, C)
        """Return the unconditional condition on device and in dtype of `condition`; kept until the model trains."""
        kept = self._unconditional
        if kept is None or kept.device != condition.device or self.training:
            self._unconditional = kept = self.make_unconditional().to(condition)
        return kept

    def train(self, mode: bool = True) -> Self:
        """Set the mode and drop the kept unconditional condition, which training changes."""
        self._unconditional = None
        return super().train(mode)

    def check(self, options: DiffusionOptions) -> None:
        """Raise Mgp5Error for options of another head, or that the generator cannot draw with."""
        super().check(options)
        self.generator.check(options, residuals=self.residuals)

    def denoise(self, condition: Tensor, context: DrawContext) -> Generator[Request, Response, Tensor]:
        """Draw one image from what `_begin` takes, a condition (1, L, C): denoise step by step, decode; return pixels
        (3, H, W) in [-1, 1].

        Yields a `Step` to begin, to denoise (each with a `Preview`) and to decode. Raises Mgp5Error as `check` does.
        """
        state = (yield Step(("begin",), (condition, context))).output  # a Step: it needs the generator's weights
        while not state.done:
            yield Step(("denoising", *state.key), state)
            total, pixels = len(state.table), None
            if context.shows(state.step, total):
                pixels = (yield self._decode(state.clean)).output
            yield Preview(state.step, total, pixels)
        return (yield self._decode(state.latents)).output

    def step(self, key: tuple[Any, ...], inputs: list[Any]) -> list[Any]:
        """Begin several images, run one denoising step of them in one call, or decode their latents one by one.

        By the first item of `key`, the inputs of an image and its output are: "begin", condition (1, L, C) and
        DrawContext to DenoisingState; "denoising", that state, which advances; "decode", latents (1, Z, h, w) to pixels
        (3, H, W) in [-1, 1].
        """
        if key[0] == "begin":
            return [self._begin(*each) for each in inputs]
        if key[0] == "denoising":
            self.generator.step(inputs)
            return inputs
        return [self.generator.decode(latents)[0] for latents in inputs]  # the decoder takes the most memory

    def _decode(self, latents: Tensor) -> Step:
        return Step(("decode", tuple(latents.shape)), latents)

    def _begin(self, condition: Tensor, context: DrawContext) -> DenoisingState:
        unconditional = None if context.options.guidance == 1.0 else self.unconditional(condition)
        return self.generator.begin(condition, unconditional, context.options, context.rng("noise"))

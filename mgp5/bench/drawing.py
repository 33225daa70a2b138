"""How long guided denoising takes by our engines and by diffusers' pipelines: same weights, condition and noise.

Letters: B images, R = 2B rows of the guidance batch, L length and D width of the condition, C, h and w of the latents.
"""

from __future__ import annotations

import copy
import math
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
)
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ..engines import Backend, apply
from ..errors import Mgp5Error
from ..generators import load_generator
from ..generators.denoising import denoise
from ..generators.latent_diffusion import LatentDiffusion
from ..generators.sampler import SamplerTable, sampler_table
from ..generators.sd3 import StableDiffusion3
from ..generators.stable_diffusion import StableDiffusion
from ..hub import Parts
from ..memory.skeletons import generator_shape
from .suites import Clock, Limits, Row, Run, Setting, by_turns, waiting

GUIDANCE = 7.5
SAMPLERS = {StableDiffusion: "ddim", StableDiffusion3: "euler"}  # one call of the model a step, as of diffusers'
# What diffusers' page "Accelerate inference" sets besides max-autotune.
INDUCTOR = {"conv_1x1_as_mm": True, "epilogue_fusion": False, "coordinate_descent_check_all_directions": True}


@dataclass(kw_only=True)
class Scene:
    """What is to be drawn, and with which weights: every way gets the same.

    Args:
        model: in `dtype`, as diffusers lays its weights out; ways that lay them out otherwise share `copies`.
        drawn: latents after the first step and after the last, by way.
    """

    model: LatentDiffusion
    table: SamplerTable
    noise: Tensor  # (B, C, h, w), float32, of values that `dtype` has
    condition: Tensor  # (1, L, D)
    unconditional: Tensor  # (1, L, D)
    copies: dict[str, LatentDiffusion] = field(default_factory=dict)
    drawn: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def copied(self, layout: str) -> LatentDiffusion:
        """A model of weights in a layout, made when it is first asked for; "" is diffusers' own."""
        if layout and layout not in self.copies:
            self.copies[layout] = copy.deepcopy(self.model)
        shared = self.copies.get(layout, self.model)
        return type(shared)(**_denoiser(shared, shared.denoiser), vae=shared.vae, schedule=shared.schedule)

    @property
    def nbytes(self) -> int:
        """Of one set of weights."""
        return sum(p.nbytes for part in (self.model.denoiser, self.model.vae) for p in part.parameters())


def draw_rows(
    parts: Parts,
    pixels: int | None,
    images: int,
    *,
    setting: Setting,
    clock: Clock,
    limits: Limits,
    backends: tuple[Backend, ...],
    compiled: bool,
    before: float | None = None,
    **options: Any,
) -> Iterator[Row]:
    """One row for each way to draw images of a size.

    Args:
        parts: one without a trained mapper has random weights.
        pixels: height and width; None is the model's own size.
        compiled: whether diffusers at its best is one of the ways.
        before: seconds of the LLM's part of an image, where they are known.
        options: of `_scene`.

    Yields rows: milliseconds of a step, everything but the VAE included; `image_ms` of an image with LLM and VAE;
    against a float32 run, `psnr` of the latents in dB, whose peak is their range, and `step_error`, the error of the
    first step relative to the step.
    """
    torch._dynamo.reset()  # each size is compiled for itself
    with torch.device("meta"):
        flops = operations(generator_shape(parts.diffusion), pixels, images)
    scene, reference = _scene(parts, pixels, images, **options)
    name = Path(parts.name.partition("+")[2] or parts.name).name
    size = f"{name}, {pixels or scene.model.native_size} px, batch {2 * images}"
    how = {"clock": clock, "setting": setting, "device": options["device"], "weights": scene.nbytes}
    found = by_turns(size, _mode(scene, backends, compiled), **how)
    for way, timed in found.items():
        row = {"name": "guided step", "size": size, "provider": way} | timed.row(0, len(scene.table))
        if not timed.skipped:
            rate = flops / row["median"] / 1e9
            row |= {"tflop_per_s": float(f"{rate:.3g}"), "share_of_matmul": round(rate / limits.matmul, 3)}
            whole = (before or 0.0) + timed.median(0) + timed.median(1)
            row |= {"image_ms": float(f"{1000 * whole:.4g}")} if images == 1 and before is not None else {}
            row |= difference(scene.drawn[way], reference, scene.noise)
        yield row


def _scene(
    parts: Parts, pixels: int | None, images: int, *, device: torch.device, dtype: torch.dtype, steps: int
) -> tuple[Scene, tuple[Tensor, Tensor]]:
    """What to draw, and the latents of a run in float32, without TF32."""
    model = (
        _random(parts.diffusion, device) if parts.trained is None else load_generator(parts.diffusion, torch.float32)
    )
    model.to(device)
    shape = model.latent_shape(*[pixels or model.native_size] * 2)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(images, *shape, generator=generator).to(dtype).float().to(device)
    condition = torch.randn(2, *model.condition_shape, generator=generator).to(device, dtype)
    scene = Scene(
        model=model,
        table=sampler_table(SAMPLERS[type(model)], model.schedule, steps),
        noise=noise,
        condition=condition[1:],
        unconditional=condition[:1],
    )
    with torch.inference_mode(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        reference = ends(denoise(model.predict, *_inputs(scene)))
    model.to(dtype)
    return scene, reference


def _random(name: str, device: torch.device) -> LatentDiffusion:
    """A generator of random weights, without its text encoders."""
    with torch.device("meta"):
        shape = generator_shape(name)
    torch.manual_seed(0)
    with torch.device(device):
        denoiser, vae = (type(part).from_config(part.config) for part in (shape.denoiser, shape.vae))
    return type(shape)(**_denoiser(shape, denoiser), vae=vae, schedule=shape.schedule)


def _denoiser(model: LatentDiffusion, denoiser: Any) -> dict[str, Any]:
    """A denoiser as the argument that a kind of model takes."""
    return {name: denoiser for name, part in model.named_children() if part is model.denoiser}


def _mode(scene: Scene, backends: tuple[Backend, ...], compiled: bool) -> dict[str, Callable[[], Run]]:
    """diffusers as it is, our engines, and diffusers at its best."""
    ways: dict[str, Callable[[], Run]] = {"diffusers": lambda: _theirs(scene, "diffusers", pipeline(scene.copied("")))}
    for backend in backends:
        ways[backend] = lambda backend=backend: _ours(scene, backend)
    if compiled:
        ways["diffusers compiled"] = lambda: _theirs(scene, "diffusers compiled", _best(scene))
    return ways


def _ours(scene: Scene, backend: Backend) -> Run:
    on_gpu, device = scene.noise.is_cuda, scene.noise.device
    # On a GPU `eager` leaves weights as diffusers has them, and the others lay them out alike.
    model = scene.copied(backend if not on_gpu else "" if backend == "eager" else "channels last")
    apply(model, backend)

    @torch.inference_mode()
    def run() -> tuple[float, ...]:
        steps, drawn = waiting(lambda: ends(model.engine.denoise(*_inputs(scene))), device)
        scene.drawn[backend] = drawn
        return steps, waiting(lambda: model.decode(drawn[-1]), device)[0]

    return run


def _theirs(scene: Scene, name: str, pipe: DiffusionPipeline) -> Run:
    """A pipeline as it is called for an image, and its VAE; `waiting` comes between."""
    given = {"prompt_embeds": scene.condition, "negative_prompt_embeds": scene.unconditional}
    if isinstance(pipe, StableDiffusion3Pipeline):
        width = pipe.transformer.config.pooled_projection_dim
        pooled = {key.replace("prompt", "pooled_prompt"): rows[:, -1, :width] for key, rows in given.items()}
        given = {key: rows[:, :-1] for key, rows in given.items()} | pooled
    given = {key: rows.expand(len(scene.noise), *rows.shape[1:]) for key, rows in given.items()}
    height, width = (pipe.vae_scale_factor * side for side in scene.noise.shape[2:])
    options = {"num_inference_steps": len(scene.table), "guidance_scale": GUIDANCE, "output_type": "latent"}
    options |= {"height": height, "width": width, "latents": scene.noise.to(scene.condition.dtype)}
    config, device, first = pipe.vae.config, scene.noise.device, []

    def keep(pipe: Any, step: int, timestep: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        first.extend([tensors["latents"]] if step == 0 else [])
        return tensors

    @torch.no_grad()
    def run() -> tuple[float, ...]:
        first.clear()
        steps, latents = waiting(lambda: pipe(**given, **options, callback_on_step_end=keep).images, device)
        scene.drawn[name] = first[0], latents
        latents = latents / config.scaling_factor + (getattr(config, "shift_factor", None) or 0.0)
        return steps, waiting(lambda: pipe.vae.decode(latents, return_dict=False)[0], device)[0]

    return run


def pipeline(model: LatentDiffusion) -> DiffusionPipeline:
    """diffusers' pipeline around a model's parts, with the sampler of `Scene.table`."""
    schedule = {name: value for name, value in asdict(model.schedule).items() if value is not None}
    if isinstance(model, StableDiffusion3):
        parts = {f"{kind}{number}": None for kind in ("text_encoder", "tokenizer") for number in ("", "_2", "_3")}
        scheduler = FlowMatchEulerDiscreteScheduler(**schedule)
        pipe = StableDiffusion3Pipeline(transformer=model.denoiser, vae=model.vae, scheduler=scheduler, **parts)
    else:
        parts = dict.fromkeys(("text_encoder", "tokenizer", "safety_checker", "feature_extractor"))
        scheduler = DDIMScheduler(**schedule, clip_sample=False)
        parts |= {"unet": model.denoiser, "vae": model.vae, "scheduler": scheduler}
        pipe = StableDiffusionPipeline(**parts, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _best(scene: Scene) -> DiffusionPipeline:
    """Channels-last, fused projections, and denoiser and VAE compiled with max-autotune, as diffusers documents it."""
    if not scene.noise.is_cuda:
        raise Mgp5Error("max-autotune with CUDA graphs needs a GPU")
    pipe = pipeline(scene.copied("diffusers compiled"))
    name = "transformer" if isinstance(pipe, StableDiffusion3Pipeline) else "unet"
    denoiser = getattr(pipe, name).to(memory_format=torch.channels_last)
    pipe.vae.to(memory_format=torch.channels_last)
    (denoiser if name == "transformer" else pipe).fuse_qkv_projections()
    how = {"options": torch._inductor.list_mode_options("max-autotune") | INDUCTOR, "fullgraph": True}
    setattr(pipe, name, torch.compile(denoiser, **how))
    pipe.vae.decode = torch.compile(pipe.vae.decode, **how)
    return pipe


def _inputs(scene: Scene) -> tuple[Tensor, Tensor, Tensor, SamplerTable, float]:
    """Of a sampling loop."""
    condition = scene.condition.expand(len(scene.noise), -1, -1)
    return scene.noise, condition, scene.unconditional, scene.table, GUIDANCE


def ends(latents: Iterator[Tensor]) -> tuple[Tensor, Tensor]:
    """The first and the last."""
    first = next(latents)
    return first, (deque(latents, maxlen=1) or [first])[0]


def operations(model: LatentDiffusion, pixels: int | None, images: int) -> int:
    """Of a guided step of a model on the meta device: products of matrices and convolutions, two for each of their
    multiplications."""
    shape = model.latent_shape(*[pixels or model.native_size] * 2)
    with FlopCounterMode(display=False) as counter, torch.device("meta"):
        latents, condition = torch.empty(2 * images, *shape), torch.empty(2 * images, *model.condition_shape)
        model.predict(latents, torch.zeros(()), condition)
    return counter.get_total_flops()


def difference(drawn: tuple[Tensor, Tensor], reference: tuple[Tensor, Tensor], noise: Tensor) -> Row:
    """Latents after the first step and the last against those of a float32 run."""
    first, last = (latents.float() for latents in drawn)
    error = float((last - reference[1]).square().mean())
    peak = float(reference[1].max() - reference[1].min())
    step = (first - reference[0]).norm() / (reference[0] - noise).norm()
    psnr = round(10 * math.log10(peak**2 / error), 1) if error else None
    return {"psnr": psnr, "step_error": float(f"{float(step):.2g}")}

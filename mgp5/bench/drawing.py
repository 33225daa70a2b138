"""Time guided denoising by our engines and by the pipelines of diffusers: same weights, condition and noise.

Letters: B images, L length and D width of the condition, C, h and w of the latents.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
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

from ..engines import Backend
from ..errors import Mgp5Error
from ..export.cache import apply
from ..generators import load_generator
from ..generators.denoising import PlainDenoiser, begin
from ..generators.latent_diffusion import LatentDiffusion
from ..generators.sampler import SamplerTable, sampler_table
from ..generators.sd3 import StableDiffusion3
from ..generators.stable_diffusion import StableDiffusion
from ..hub import Parts
from ..memory.skeletons import generator_shape
from .timing import Bench, Limits, Phases, Row, digits, interleave

Drawn = tuple[Tensor, Tensor]  # latents (B, C, h, w) after the first step and after the last
GUIDANCE = 7.5
REFERENCE = "float32"  # by PyTorch, without TF32
SAMPLERS = {StableDiffusion: "ddim", StableDiffusion3: "euler"}  # one call of the model a step, as of diffusers'
# What diffusers' page "Accelerate inference" sets besides max-autotune.
INDUCTOR = {"conv_1x1_as_mm": True, "epilogue_fusion": False, "coordinate_descent_check_all_directions": True}


@dataclass(kw_only=True)
class Scene:
    """What every way draws, the weights that it draws with, and what it drew: latents after the first and last step."""

    model: LatentDiffusion  # in the dtype of the benchmark; each way has a copy, to lay weights out as it likes
    table: SamplerTable
    noise: Tensor  # (B, C, h, w) in float32, of values that the dtype of the benchmark has
    condition: Tensor  # (1, L, D)
    unconditional: Tensor  # (1, L, D)
    drawn: dict[str, Drawn] = field(default_factory=dict)  # by the name of a way; REFERENCE is one more

    def draw(self, model: LatentDiffusion) -> Drawn:
        """Denoise by the engine of a model, or without where it has none."""
        denoiser = model.engine.model_for(1) if model.engine else PlainDenoiser(model.predict)
        given = self.condition, self.unconditional, self.table, GUIDANCE
        states = [begin(denoiser, noise[None], *given) for noise in self.noise]
        model.step(states)
        first = torch.cat([state.latents for state in states])
        while not states[0].done:
            model.step(states)
        return first, torch.cat([state.latents for state in states])


def draw_rows(
    bench: Bench,
    parts: Parts,
    pixels: int | None,
    images: int,
    *,
    limits: Limits,
    steps: int,
    compiled: bool,
    before: float | None = None,
) -> Iterator[Row]:
    """Yield one row for each way to draw images of a size; a model that is not trained gets random weights.

    Times are milliseconds of a step, everything but the VAE included; `vae_ms` are those of the VAE for all images, and
    `image_ms` is a whole image with both and `before`, the seconds of the LLM. Against a run in float32, `psnr` is that
    of the latents in dB, whose peak is their range, and `step_error` the error of the first step relative to the step.
    `compiled` adds diffusers compiled.
    """
    torch._dynamo.reset()  # each size is compiled for itself
    with torch.device("meta"):
        flops = operations(generator_shape(parts.diffusion), pixels, images)
    scene = make_scene(bench, parts, pixels, images, steps)
    name = Path(parts.name.partition("+")[2] or parts.name).name
    size = f"{name}, {pixels or scene.model.native_size} px, batch {2 * images}"
    weights = sum(p.nbytes for part in (scene.model.denoiser, scene.model.vae) for p in part.parameters())
    for way, timing in interleave(bench, size, ways(scene, bench, compiled), weights).items():
        row = {"name": "guided step", "size": size, "provider": way} | timing.row(0, len(scene.table))
        if not timing.skipped:
            rate = flops / row["median"] / 1e9
            row |= {"tflop_per_s": digits(rate, 3), "share_of_matmul": round(rate / limits.matmul, 3)}
            row["vae_ms"] = digits(1000 * timing.median(1))
            if images == 1 and before is not None:
                row["image_ms"] = digits(1000 * (before + timing.median(0) + timing.median(1)))
            row |= difference(scene.drawn[way], scene.drawn[REFERENCE], scene.noise)
        yield row


def drawing_kind(parts: Parts) -> str:
    """Return the kind of rows that tell how fast a model draws: "guided step", or without a denoiser "image"."""
    if parts.trained is None:
        return "guided step"
    with torch.device("meta"):
        return "guided step" if isinstance(generator_shape(parts.diffusion), LatentDiffusion) else "image"


def make_scene(bench: Bench, parts: Parts, pixels: int | None, images: int, steps: int) -> Scene:
    """Return what to draw and what draws it; a model that is not trained gets random weights."""
    device, dtype = bench.device, bench.dtype
    if parts.trained is None:
        model = _random(parts.diffusion, device)
    else:
        model = load_generator(parts.diffusion, torch.float32).to(device)
    shape = model.latent_shape(*[pixels or model.native_size] * 2)
    rng = torch.Generator().manual_seed(0)
    noise = torch.randn(images, *shape, generator=rng).to(dtype).float().to(device)
    condition = torch.randn(2, *model.condition_shape, generator=rng).to(device, dtype)
    table = sampler_table(SAMPLERS[type(model)], model.schedule, steps)
    scene = Scene(model=model, table=table, noise=noise, condition=condition[1:], unconditional=condition[:1])
    with torch.inference_mode(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        scene.drawn[REFERENCE] = scene.draw(model)
    model.to(dtype)
    return scene


def _random(name: str, device: torch.device) -> LatentDiffusion:
    """Return a generator of random weights on a device, without its text encoders."""
    with torch.device("meta"):
        model = generator_shape(name)
    torch.manual_seed(0)
    with device:
        for part, module in list(model.named_children()):
            text = part.startswith("text_encoder")
            setattr(model, part, None if text else type(module).from_config(module.config))
    return model.requires_grad_(False).eval()


def ways(scene: Scene, bench: Bench, compiled: bool) -> dict[str, Callable[[], Phases]]:
    """Return the ways to draw: diffusers as it is, our engines, and diffusers compiled."""
    found = {"diffusers": lambda: _theirs(scene, "diffusers", pipeline(scene.model))}
    found |= {backend: partial(_ours, scene, backend, bench.exported) for backend in bench.backends}
    if compiled:
        found["diffusers compiled"] = lambda: _theirs(scene, "diffusers compiled", compiled_pipeline(scene))
    return found


def _ours(scene: Scene, backend: Backend, exported: Path | None) -> Phases:
    """Prepare an engine; its phases are the sampling loop and the VAE."""
    model = copy.deepcopy(scene.model)
    apply(model, backend, exported if backend == "onnx" else None)

    @torch.inference_mode()
    def steps() -> None:
        scene.drawn[backend] = scene.draw(model)

    return steps, torch.inference_mode()(lambda: model.decode(scene.drawn[backend][-1]))


def _theirs(scene: Scene, name: str, pipe: DiffusionPipeline) -> Phases:
    """Prepare a pipeline of diffusers; its phases are the call for latents and the VAE."""
    rows = {"prompt_embeds": scene.condition, "negative_prompt_embeds": scene.unconditional}
    if isinstance(pipe, StableDiffusion3Pipeline):
        width = pipe.transformer.config.pooled_projection_dim
        pooled = {key.replace("prompt", "pooled_prompt"): x[:, -1, :width] for key, x in rows.items()}
        rows = {key: x[:, :-1] for key, x in rows.items()} | pooled
    rows = {key: x.expand(len(scene.noise), *x.shape[1:]) for key, x in rows.items()}
    height, width = (pipe.vae_scale_factor * side for side in scene.noise.shape[2:])
    options = {"num_inference_steps": len(scene.table), "guidance_scale": GUIDANCE, "output_type": "latent"}
    options |= {"height": height, "width": width, "latents": scene.noise.to(scene.condition.dtype)}
    config, first = pipe.vae.config, []

    def keep(pipe: Any, step: int, timestep: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        first.extend([tensors["latents"]] if step == 0 else [])
        return tensors

    def steps() -> None:
        first.clear()
        latents = pipe(**rows, **options, callback_on_step_end=keep).images
        scene.drawn[name] = first[0], latents

    @torch.no_grad()
    def decode() -> Tensor:  # (B, 3, H, W)
        latents = scene.drawn[name][-1] / config.scaling_factor + (getattr(config, "shift_factor", None) or 0.0)
        return pipe.vae.decode(latents, return_dict=False)[0]

    return steps, decode


def pipeline(model: LatentDiffusion) -> DiffusionPipeline:
    """Return the pipeline of diffusers around the parts of a model, with the sampler of `Scene.table`."""
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


def compiled_pipeline(scene: Scene) -> DiffusionPipeline:
    """Return a pipeline as diffusers documents its fastest: channels-last, fused projections, and denoiser and VAE
    compiled with max-autotune. Raises Mgp5Error without a GPU."""
    if not scene.noise.is_cuda:
        raise Mgp5Error("max-autotune with CUDA graphs needs a GPU")
    pipe = pipeline(copy.deepcopy(scene.model))
    name = scene.model.denoiser_name
    denoiser = getattr(pipe, name).to(memory_format=torch.channels_last)
    pipe.vae.to(memory_format=torch.channels_last)
    (denoiser if name == "transformer" else pipe).fuse_qkv_projections()
    compiler = {"options": torch._inductor.list_mode_options("max-autotune") | INDUCTOR, "fullgraph": True}
    setattr(pipe, name, torch.compile(denoiser, **compiler))
    pipe.vae.decode = torch.compile(pipe.vae.decode, **compiler)
    return pipe


def operations(model: LatentDiffusion, pixels: int | None, images: int) -> int:
    """Count the operations of a guided step, two for each multiplication, by a model on the meta device."""
    shape = model.latent_shape(*[pixels or model.native_size] * 2)
    with FlopCounterMode(display=False) as counter, torch.device("meta"):
        latents, condition = torch.empty(2 * images, *shape), torch.empty(2 * images, *model.condition_shape)
        model.predict(latents, torch.zeros(()), condition)
    return counter.get_total_flops()


def difference(drawn: Drawn, reference: Drawn, noise: Tensor) -> Row:
    """Compare latents after the first step and the last with those of a float32 run; return columns of a row."""
    first, last = (latents.float() for latents in drawn)
    error = float((last - reference[1]).square().mean())
    peak = float(reference[1].max() - reference[1].min())
    step = (first - reference[0]).norm() / (reference[0] - noise).norm()
    psnr = round(10 * math.log10(peak**2 / error), 1) if error else None
    return {"psnr": psnr, "step_error": digits(step, 2)}

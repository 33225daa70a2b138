"""Train the demo's text-conditioned latent diffusion model (UNet and CLIP text encoder together; v-prediction).

Letters: B pictures, T tokens of a caption, z latents (B, 8, 16, 16) of unit scale.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import click
import numpy as np
import torch
from clip import captions
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from fit import Run, autocast, device, fit, step_generator
from PIL import Image
from renders import renders, right, scores, to_pixels
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPModel, CLIPTextModel, CLIPTokenizer

from mgp5.storyland.judge import load_judge
from mgp5.storyland.world import ATTRIBUTES

EMPTY = 0.1  # share of training captions that are left empty, for classifier-free guidance
WEATHER = list(ATTRIBUTES).index("weather")
SHOWN = 48  # pictures of an evaluation


class Painter(nn.Module):
    """The two networks that are trained."""

    def __init__(self, unet: UNet2DConditionModel, text: CLIPTextModel) -> None:
        super().__init__()
        self.unet = unet
        self.text = text

    def forward(self, z: Tensor, t: Tensor, ids: Tensor) -> Tensor:  # (B, 8, 16, 16), (B,), (B, T) -> v like z
        return self.unet(z, t, self.text(input_ids=ids).last_hidden_state, return_dict=False)[0]


def new_unet() -> UNet2DConditionModel:
    """10.9M parameters; attention only at 8x8 and 4x4, because at 16x16 it costs nearly half the time."""
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=8,
        out_channels=8,
        block_out_channels=(64, 128, 192),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,  # the number of heads, despite its name
        norm_num_groups=16,
        cross_attention_dim=128,
    )


def new_painter(work: Path, begin: Path | None) -> Painter:
    """A new UNet with the text encoder of `work`, or those of the pipeline `begin`, its text encoder frozen."""
    if begin is None:
        return Painter(new_unet(), CLIPModel.from_pretrained(work / "clip").text_model)
    unet = UNet2DConditionModel.from_pretrained(begin / "unet", torch_dtype=torch.float32)
    text = CLIPTextModel.from_pretrained(begin / "text_encoder", dtype=torch.float32)
    return Painter(unet, text.requires_grad_(False))  # what a mapper has learned from this text encoder stays true


def new_scheduler() -> DDIMScheduler:
    """The noise schedule of Stable Diffusion, with v-prediction."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="v_prediction",
    )


@torch.no_grad()
def moments(work: Path, vae: AutoencoderKL, pictures: np.ndarray) -> np.ndarray:
    """Mean and standard deviation of every picture's latents, (count, 16, 16, 16) half precision, kept on disk.

    The file is named after the encoder's weights, so another encoder never meets old latents.
    """
    digest = hashlib.sha256()
    for part in (vae.encoder, vae.quant_conv):
        for value in part.state_dict().values():
            digest.update(value.cpu().numpy().tobytes())
    path = work / f"latents-{len(pictures)}-{digest.hexdigest()[:8]}.npy"
    if not path.exists():
        out = np.zeros((len(pictures), 16, 16, 16), np.float16)
        for start in range(0, len(pictures), 50):
            with autocast():
                dist = vae.encode(to_pixels(pictures[start : start + 50]).to(device())).latent_dist
            out[start : start + 50] = torch.cat([dist.mean, dist.std], 1).half().cpu().numpy()
        np.save(path, out)
    return np.load(path)


def diffuse(schedule: DDIMScheduler, z: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Noised latents and the v that the UNet must predict from them."""
    return schedule.add_noise(z, noise, t), schedule.get_velocity(z, noise, t)


@torch.no_grad()
def paint(painter: Painter, ids: Tensor, empty: Tensor, guidance: float = 3.0, steps: int = 20) -> Tensor:
    """Latents (B, 8, 16, 16) for captions (B, T) by DDIM with classifier-free guidance."""
    schedule, count = new_scheduler(), len(ids)
    schedule.set_timesteps(steps)
    z = torch.randn(count, 8, 16, 16, generator=step_generator(0, 5)).to(ids.device)
    both = torch.cat([empty.expand_as(ids), ids])
    states = painter.text(input_ids=both).last_hidden_state
    for t in schedule.timesteps:
        with autocast():
            v = painter.unet(torch.cat([z, z]), t, states, return_dict=False)[0].float()
        free, bound = v.chunk(2)
        z = schedule.step(free + guidance * (bound - free), t, z, return_dict=False)[0]
    return z


@torch.no_grad()
def decode(vae: AutoencoderKL, z: Tensor) -> Tensor:  # (B, 8, 16, 16) -> (B, 3, 128, 128) in [-1, 1]
    """Pictures of latents of unit scale."""
    parts = [vae.decode(part / vae.config.scaling_factor).sample for part in z.split(8)]
    return torch.cat(parts).float().clamp(-1, 1)


def sheet(pixels: Tensor, path: Path, columns: int = 8) -> None:
    """Write pictures (B, 3, H, W) in [-1, 1] as one contact sheet."""
    tiles = ((pixels.cpu() + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    rows = [np.concatenate(tiles[start : start + columns], 1) for start in range(0, len(tiles), columns)]
    rows[-1] = np.pad(rows[-1], ((0, 0), (0, rows[0].shape[1] - rows[-1].shape[1]), (0, 0)))
    Image.fromarray(np.concatenate(rows)).save(path)


def save_pipeline(folder: Path, painter: Painter, vae: AutoencoderKL, tokenizer: CLIPTokenizer) -> None:
    """Complete `folder`, which already holds vae and tokenizer, to a StableDiffusionPipeline."""
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=painter.text,
        tokenizer=tokenizer,
        unet=painter.unet,
        scheduler=new_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.unet.save_pretrained(folder / "unet")
    pipeline.text_encoder.save_pretrained(folder / "text_encoder")
    pipeline.scheduler.save_pretrained(folder / "scheduler")
    pipeline.save_config(folder)


@click.command()
@click.option(
    "--work", type=click.Path(path_type=Path), required=True, help="Folder that holds clip and diffusion/vae."
)
@click.option("--steps", default=6000)
@click.option("--minutes", default=1e9, help="Stop after this time; the next call goes on.")
@click.option("--batch", default=32)
@click.option("--lr", default=8e-4)
@click.option("--decay", default=Run.decay, help="Last share of the steps, over which the learning rate falls to zero.")
@click.option("--seed", default=6, help="Of the batches; training that goes on wants others.")
@click.option("--every", default=500, help="Steps between evaluations.")
@click.option("--threads", default=0, help="CPU threads; 0 = all.")
@click.option("--train", "amount", default=20000, help="Number of training renders.")
@click.option("--snow", default=0.0, help="Share of a batch that is drawn from snowy pictures alone; flakes are hard.")
@click.option("--compile", "compiled", is_flag=True)
@click.option(
    "--begin", type=click.Path(path_type=Path), help="Train the UNet of this pipeline further, its text encoder frozen."
)
def main(
    work: Path,
    steps: int,
    minutes: float,
    batch: int,
    lr: float,
    decay: float,
    seed: int,
    every: int,
    threads: int,
    amount: int,
    snow: float,
    compiled: bool,
    begin: Path | None,
) -> None:
    if threads:
        torch.set_num_threads(threads)
    torch.manual_seed(0)
    vae = AutoencoderKL.from_pretrained(work / "diffusion" / "vae").to(device()).eval().requires_grad_(False)
    tokenizer = CLIPTokenizer.from_pretrained(work / "diffusion" / "tokenizer")
    pictures, rows = renders(work, "train", amount)
    latents = moments(work, vae, pictures)
    snowy = np.flatnonzero(rows[:, WEATHER] == ATTRIBUTES["weather"].index("snowy"))
    painter = new_painter(work, begin).to(device()).train()
    schedule = new_scheduler()

    def encode(texts: list[str]) -> Tensor:
        return tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids.to(device())

    def terms(z: Tensor, t: Tensor, ids: Tensor, v: Tensor) -> Tensor:
        return functional.mse_loss(painter(z, t, ids).float(), v)

    run_terms = torch.compile(terms) if compiled else terms
    progress = {"step": 0}

    def loss(step: int) -> dict[str, Tensor]:
        progress["step"] = step + 1
        generator = step_generator(step, seed)
        chosen = torch.randint(len(latents), (batch,), generator=generator).numpy()
        chosen[: round(snow * batch)] = snowy[chosen[: round(snow * batch)] % len(snowy)]
        mean, std = torch.from_numpy(latents[chosen]).float().chunk(2, dim=1)
        first, noise = torch.randn(2, *mean.shape, generator=generator)
        t = torch.randint(1000, (batch,), generator=generator)
        dropped = (torch.rand(batch, generator=generator) < EMPTY).tolist()
        texts = ["" if drop else text for drop, text in zip(dropped, captions(rows[chosen], step), strict=True)]
        z, v = diffuse(schedule, (mean + std * first) * vae.config.scaling_factor, noise, t)
        where = device()
        return {"v": run_terms(z.to(where), t.to(where), encode(texts), v.to(where))}

    run = Run(name="unet", work=work, steps=steps, lr=lr, decay=decay, minutes=minutes)
    judge = load_judge().to(device())
    asked = renders(work, "test", 512)[1][:SHOWN]

    def evaluate(model: nn.Module) -> dict[str, float]:
        pixels = decode(vae, paint(model, encode(captions(asked, -1)), encode([""])))
        sheet(pixels, run.folder / f"{progress['step']:06d}.png")
        return scores(right(judge, pixels, asked))

    average = fit(run, painter, loss, evaluate, every)
    save_pipeline(work / "diffusion", average, vae, tokenizer)
    report = evaluate(average)
    click.echo(" ".join(f"{name} {report[name]:.3f}" for name in (*ATTRIBUTES, "mean", "all")))


if __name__ == "__main__":
    main()

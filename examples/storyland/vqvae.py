"""Train the tiny VQ-VAE of demo-vargpt: 128x128 pixels <-> 130 codes of six scales; L1 + L2 + codebook losses, and with
--tower a perceptual one: the mean squared difference of a frozen vision tower's last states, each of unit variance."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import click
import numpy as np
import torch
from fit import Run, device, fit, step_generator
from renders import renders, right, scores, to_pixels
from torch import Tensor
from torch.nn import functional
from transformers import LlavaForConditionalGeneration

from mgp5.generators.vqvae import VQVAE, VQVAEConfig
from mgp5.storyland.judge import Judge, load_judge

# 1.8M parameters, 3.6 MB in half precision. With four halvings a story of five images takes 660 positions of the LLM;
# with three, and maps up to 16x16, more than 2,500.
CONFIG = VQVAEConfig(
    patch_nums=(1, 2, 3, 4, 6, 8),
    num_codes=1024,
    code_width=16,
    channels=(8, 24, 48, 64, 88),
    layers_per_block=1,
    norm_groups=4,
)


def perceptual(folder: Path) -> Callable[[Tensor, Tensor], Tensor]:
    """The distance of images (B, 3, H, W) in [-1, 1] to others, as the vision tower of a LLaVA sees them."""
    tower = LlavaForConditionalGeneration.from_pretrained(folder).model.vision_tower.to(device()).requires_grad_(False)

    def states(pixels: Tensor) -> Tensor:
        side = tower.config.image_size
        resized = functional.interpolate(pixels, (side, side), mode="bilinear", antialias=True)
        states = tower(pixel_values=resized).last_hidden_state  # the demo's tower has mean and deviation 0.5
        return functional.layer_norm(states, states.shape[-1:])

    def distance(made: Tensor, pixels: Tensor) -> Tensor:
        with torch.no_grad():
            target = states(pixels)
        return functional.mse_loss(states(made), target)

    return distance


@torch.no_grad()
def evaluate(vqvae: VQVAE, judge: Judge, pictures: np.ndarray, rows: np.ndarray) -> dict[str, float]:
    """PSNR in dB of images decoded from their codes, and the shares of attributes that the judge still reads right."""
    ratios, hits = [], []
    for start in range(0, len(rows), 32):
        x = to_pixels(pictures[start : start + 32]).to(device())
        y = vqvae.decode(vqvae.quantizer.f_hat(vqvae.encode(x)))
        ratios.append(-10 * ((x - y) / 2).square().mean((1, 2, 3)).log10())
        hits.append(right(judge, y, rows[start : start + 32]))
    use = {"codebook_use": vqvae.quantizer.codebook_use()}
    return {"psnr": float(torch.cat(ratios).mean())} | use | scores(torch.cat(hits))


@click.command()
@click.option("--work", type=click.Path(path_type=Path), required=True, help="Folder for renders, logs and states.")
@click.option("--steps", default=15000)
@click.option("--minutes", default=1e9, help="Stop after this time; the next call goes on.")
@click.option("--batch", default=4)
@click.option("--lr", default=1e-3)
@click.option("--images", default=20000, help="Number of training renders; tests take 512.")
@click.option("--tower", type=click.Path(path_type=Path), help="Folder of a LLaVA: its vision tower gives a loss too.")
def main(work: Path, steps: int, minutes: float, batch: int, lr: float, images: int, tower: Path | None) -> None:
    pictures, _ = renders(work, "train", images)
    test, rows = renders(work, "test", 512)
    torch.manual_seed(0)
    vqvae, judge = VQVAE(CONFIG).to(device()), load_judge().to(device())
    seen = perceptual(tower) if tower else None

    def loss(step: int) -> dict[str, torch.Tensor]:
        generator = step_generator(step, 3)
        chosen = torch.randint(len(pictures), (batch,), generator=generator).numpy()
        x = to_pixels(pictures[chosen]).to(device())
        terms, quantized = vqvae.losses(x, seen)
        vqvae.quantizer.restart_dead_codes(quantized.residuals, generator)
        return terms

    run = Run(name="vqvae", work=work, steps=steps, lr=lr, minutes=minutes, ema=0.998)
    average = fit(run, vqvae, loss, lambda model: evaluate(model, judge, test[:128], rows[:128]))
    average.save(work / "vargpt" / "vqvae")
    found = evaluate(average, judge, test, rows)
    click.echo(", ".join(f"{name} {value:.3f}" for name, value in found.items()), err=True)


if __name__ == "__main__":
    main()

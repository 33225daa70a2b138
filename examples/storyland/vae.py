"""Train the tiny AutoencoderKL: 128x128 pixels <-> 16x16x8 latents; L1 + L2 + KL.

With --decoder only the decoder is trained further: latents, and everything trained on them, stay valid.
"""

from __future__ import annotations

from pathlib import Path

import click
import torch
from diffusers import AutoencoderKL
from fit import Run, autocast, device, fit, step_generator
from renders import renders, to_pixels

CHANNELS = (8, 32, 64, 128)
KL = 2e-5  # per latent; at 1e-4 the posterior collapses at this size


def new_vae() -> AutoencoderKL:
    """2.6M parameters; no attention, four channels in a group, so that the convolutions stay cheap on a CPU."""
    vae = AutoencoderKL(
        block_out_channels=CHANNELS,
        down_block_types=("DownEncoderBlock2D",) * len(CHANNELS),
        up_block_types=("UpDecoderBlock2D",) * len(CHANNELS),
        latent_channels=8,
        layers_per_block=1,
        norm_num_groups=4,
        mid_block_add_attention=False,
        sample_size=128,
    )
    # Born with small noise (std 0.05): at the default of 1 it drowns the signal and the posterior collapses.
    torch.nn.init.constant_(vae.quant_conv.bias[8:], -6.0)
    return vae


@torch.no_grad()
def psnr(vae: AutoencoderKL, pictures: torch.Tensor, amount: int = 128) -> float:
    """Mean peak signal-to-noise ratio in dB of reconstructions (latent mode) of pictures (B, 3, H, W) in [-1, 1]."""
    total = 0.0
    for start in range(0, amount, 32):
        x = pictures[start : start + 32].to(device())
        y = vae.decode(vae.encode(x).latent_dist.mode()).sample.clamp(-1, 1)
        mse = ((x - y) / 2).square().mean(dim=(1, 2, 3))
        total += float((-10 * mse.log10()).sum())
    return total / amount


@torch.no_grad()
def latent_std(vae: AutoencoderKL, pictures: torch.Tensor) -> float:
    """Standard deviation of sampled latents, the inverse of the scaling factor."""
    dist = vae.encode(pictures.to(device())).latent_dist
    return float(dist.sample(step_generator(0)).std())


@click.command()
@click.option("--work", type=click.Path(path_type=Path), required=True, help="Folder for renders, logs and states.")
@click.option("--steps", default=11000)
@click.option("--minutes", default=1e9, help="Stop after this time; the next call goes on.")
@click.option("--decoder", is_flag=True, help="Train only the decoder, from the finished model.")
@click.option("--batch", default=4)
@click.option("--lr", default=1e-3)
def main(work: Path, steps: int, minutes: float, decoder: bool, batch: int, lr: float) -> None:
    pictures, _ = renders(work, "train", 20000)
    test = to_pixels(renders(work, "test", 512)[0])
    vae = (AutoencoderKL.from_pretrained(work / "diffusion" / "vae") if decoder else new_vae()).to(device())
    vae.encoder.requires_grad_(not decoder)
    vae.quant_conv.requires_grad_(not decoder)

    def terms(x: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        dist = vae.encode(x).latent_dist
        y = vae.decode(dist.mean + dist.std * noise).sample
        return (y - x).abs().mean() + (y - x).square().mean(), KL * dist.kl().mean() / dist.mean[0].numel()

    def loss(step: int) -> dict[str, torch.Tensor]:
        generator = step_generator(step, 1 + decoder)
        rows = torch.randint(len(pictures), (batch,), generator=generator).numpy()
        x = to_pixels(pictures[rows]).to(device(), memory_format=torch.channels_last)
        noise = torch.randn(batch, 8, 16, 16, generator=generator).to(device())
        reconstruction, kl = terms(x, noise)
        return {"reconstruction": reconstruction, "kl": kl}

    run = Run(name="vae-decoder" if decoder else "vae", work=work, steps=steps, lr=lr, minutes=minutes, ema=0.998)
    average = fit(run, vae, loss, lambda model: {"psnr": psnr(model, test)})
    with autocast():
        std = latent_std(average, test[:128])
    if not decoder:
        average.register_to_config(scaling_factor=round(1 / std, 5))
    average.save_pretrained(work / "diffusion" / "vae")
    click.echo(f"psnr {psnr(average, test, 512):.2f} dB, latent std {std:.3f}", err=True)


if __name__ == "__main__":
    main()

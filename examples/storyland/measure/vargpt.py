"""What VARGPT makes of Storyland's test pictures: through the VQ-VAE's codes and back, and drawn from captions.

A judge reads the seven attributes of pictures (B pictures). With a VQ-VAE's folder alone only the first is measured.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import click
import torch
from measure.seed import judged, pixels_of, world
from PIL import Image as pil
from rich.progress import track

from mgp5.apps.open_model import load
from mgp5.events import Finished
from mgp5.generators.vqvae import CONFIG, VQVAE
from mgp5.heads.batch import to_pixels
from mgp5.heads.vargpt import VARGPTHead
from mgp5.inference.reply import generate_batch
from mgp5.model import InterleavedModel
from mgp5.options import VARGPTOptions, reply_options
from mgp5.prompts import illustrate
from mgp5.storyland.judge import Judge, load_judge
from mgp5.storyland.world import Scene


@torch.inference_mode()
def reconstruction(vqvae: VQVAE, judge: Judge, scenes: list[Scene], pictures: list[pil.Image], batch: int) -> dict:
    """Pictures to codes and back: attributes, PSNR in dB, use of the codebook."""
    pixels = torch.stack([to_pixels(picture, (vqvae.native_size,) * 2) for picture in pictures])
    codes = torch.cat([vqvae.encode(part) for part in track(pixels.split(batch), "through codes and back")])
    again = torch.cat([vqvae.decode(vqvae.quantizer.f_hat(part)) for part in codes.split(batch)])
    counts = torch.bincount(codes.flatten(), minlength=vqvae.config.num_codes).float()
    shares = counts / counts.sum()
    return {
        "attributes, through codes and back": judged(judge, again, scenes),
        "PSNR": (-10 * ((pixels - again) / 2).square().mean((1, 2, 3)).log10()).mean().item(),
        "share of the codebook in use": (counts > 0).float().mean().item(),
        "perplexity of the codes": torch.exp(-(shares * shares.clamp(min=1e-12).log()).sum()).item(),
    }


def drawing(model: InterleavedModel, judge: Judge, scenes: list[Scene], captions: list[str], batch: int) -> dict:
    """Images drawn from captions: attributes, and seconds an image, `batch` at a time and alone."""
    options = reply_options(VARGPTOptions, image="always", max_tokens=0, max_images=1)
    asked, images = [illustrate([], text) for text in captions], []
    began = time.perf_counter()
    for start in track(range(0, len(asked), batch), "images of captions"):
        events = generate_batch(model, asked[start : start + batch], options)
        done = {number: event.message for number, event in events if isinstance(event, Finished)}
        images += [done[number].images[0] for number in sorted(done)]
    together = (time.perf_counter() - began) / len(asked)
    began = time.perf_counter()
    for talk in asked[:10]:
        list(generate_batch(model, [talk], options))
    return {
        "attributes, drawn from the caption": judged(judge, pixels_of(images), scenes),
        "seconds an image": together,
        "seconds an image, alone": (time.perf_counter() - began) / len(asked[:10]),
    }


@click.command()
@click.option("--model", required=True, type=click.Path(path_type=Path), help="A run, a packed model, or a VQ-VAE.")
@click.option("--pictures", default=500, show_default=True, help="B, from the test split.")
@click.option("--batch", default=16, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="JSON file.")
def main(model: Path, pictures: int, batch: int, out: Path) -> None:
    """Measure a model with the head of VARGPT, or its VQ-VAE, on test pictures of Storyland."""
    judge, (scenes, drawn, captions) = load_judge(), world(pictures)
    opened = None if (model / CONFIG).is_file() else load(str(model))
    if opened and not isinstance(opened.head, VARGPTHead):
        raise click.UsageError(f"{model} has the head {opened.head.spec.name}, expected vargpt")
    vqvae = opened.head.generator if opened else VQVAE.load(model).eval()
    found: dict[str, Any] = {"model": str(model), "pictures": pictures}
    found |= reconstruction(vqvae, judge, scenes, drawn, batch)
    found |= drawing(opened, judge, scenes, captions, batch) if opened else {}
    out.write_text(json.dumps(found, indent=2) + "\n")
    click.echo(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()

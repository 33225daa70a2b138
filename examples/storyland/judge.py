"""Train the judge of mgp5.storyland: a small CNN that reads the seven attributes of a picture (B pictures)."""

from __future__ import annotations

from pathlib import Path

import click
import numpy as np
import torch
from fit import Run, device, fit, step_generator
from renders import renders, right, scores, to_pixels
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from mgp5.storyland.draw import draw
from mgp5.storyland.judge import FILE, SIZE, Judge, load_judge
from mgp5.storyland.world import ATTRIBUTES, random_scene, rng


def disturb(pixels: Tensor, generator: torch.Generator) -> Tensor:  # (B, 3, 64, 64) -> (B, 3, 64, 64)
    """Small shift and zoom, blur and noise of random strength, so that soft pictures are read like sharp ones."""
    size = len(pixels)
    uniform = torch.rand(size, 6, generator=generator).to(pixels.device)
    theta = torch.zeros(size, 2, 3, device=pixels.device)
    theta[:, 0, 0] = theta[:, 1, 1] = 0.94 + 0.12 * uniform[:, 0]
    theta[:, :, 2] = 0.16 * (uniform[:, 1:3] - 0.5)
    grid = functional.affine_grid(theta, list(pixels.shape), align_corners=False)
    pixels = functional.grid_sample(pixels, grid, padding_mode="border", align_corners=False)
    small = functional.avg_pool2d(pixels, 2)
    soft = functional.interpolate(small, scale_factor=2, mode="bilinear", align_corners=False)
    weight = (1.4 * uniform[:, 3] - 0.4).clamp(min=0)[:, None, None, None]
    pixels = torch.lerp(pixels, soft, weight)
    pixels = pixels * (0.9 + 0.2 * uniform[:, 4])[:, None, None, None]
    noise = torch.randn(pixels.shape, generator=generator).to(pixels.device)
    return pixels + 0.25 * uniform[:, 5, None, None, None].square() * noise


def fresh(count: int, seed: int = 77) -> tuple[Tensor, Tensor]:
    """Pictures (count, 3, 128, 128) of uniform scenes that no training has seen, and their rows (count, 7)."""
    drawn = [random_scene(rng("judge", seed, index)) for index in range(count)]
    pictures = [np.asarray(draw(scene, 2**31 + index)) for index, scene in enumerate(drawn)]
    return to_pixels(np.stack(pictures)), torch.tensor([scene.indices() for scene in drawn])


@click.command()
@click.option("--work", type=click.Path(path_type=Path), required=True, help="Folder for renders, logs and states.")
@click.option("--steps", default=1000)
@click.option("--minutes", default=1e9, help="Stop after this time; the next call goes on.")
@click.option("--batch", default=64)
@click.option("--lr", default=3e-3)
@click.option("--threads", default=0, help="CPU threads; 0 = all.")
@click.option("--train", "amount", default=20000, help="Number of training renders.")
@click.option("--out", type=click.Path(path_type=Path), default=FILE)
def main(work: Path, steps: int, minutes: float, batch: int, lr: float, threads: int, amount: int, out: Path) -> None:
    if threads:
        torch.set_num_threads(threads)
    torch.manual_seed(0)
    pictures, rows = renders(work, "train", amount)
    test, test_rows = renders(work, "test", 512)
    judge = Judge().to(device())

    def loss(step: int) -> dict[str, Tensor]:
        generator = step_generator(step, 3)
        chosen = torch.randint(len(pictures), (batch,), generator=generator).numpy()
        small = functional.adaptive_avg_pool2d(to_pixels(pictures[chosen]).to(device()), SIZE)
        target = torch.from_numpy(rows[chosen]).to(device())
        logits = judge(disturb(small, generator))
        return {name: functional.cross_entropy(logits[name], target[:, i]) for i, name in enumerate(ATTRIBUTES)}

    def evaluate(model: nn.Module) -> dict[str, float]:
        return scores(right(model, to_pixels(test), test_rows))

    run = Run(name="judge", work=work, steps=steps, lr=lr, minutes=minutes, ema=0.99, warmup=100, decay=0.7)
    average = fit(run, judge, loss, evaluate, 200)
    half = {key: value.half().contiguous() for key, value in average.state_dict().items() if "num_batches" not in key}
    save_file(half, out)
    for name, pixels, truth in (("test", to_pixels(test), test_rows), ("fresh", *fresh(2000))):
        report = scores(right(load_judge(out), pixels, truth))
        click.echo(f"{name} {len(pixels)}: " + " ".join(f"{key} {value:.4f}" for key, value in report.items()))


if __name__ == "__main__":
    main()

"""Train the judge: a small CNN that reads the seven attributes of a Storyland picture (B pictures, F features)."""

from __future__ import annotations

from pathlib import Path

import click
import numpy as np
import torch
from fit import Run, device, fit, step_generator
from renders import renders, to_pixels
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from mgp5.data.storyland.draw import draw
from mgp5.data.storyland.world import ATTRIBUTES, random_scene, rng

SIZE = 64  # what the judge looks at, pixels
WIDTHS = ((3, 32, 1), (32, 32, 2), (32, 64, 1), (64, 64, 2), (64, 128, 1), (128, 128, 2), (128, 128, 1), (128, 128, 1))
FILE = Path(__file__).with_name("judge.safetensors")


class Judge(nn.Module):
    """Eight convolutions, mean and maximum over the picture, one linear head per attribute; 0.57M parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential()
        for fan_in, fan_out, stride in WIDTHS:
            self.body.append(nn.Conv2d(fan_in, fan_out, 3, stride, 1, bias=False))
            self.body.append(nn.BatchNorm2d(fan_out))
            self.body.append(nn.SiLU())
        width = 2 * WIDTHS[-1][1]
        self.heads = nn.ModuleDict({name: nn.Linear(width, len(values)) for name, values in ATTRIBUTES.items()})

    def features(self, pixels: Tensor) -> Tensor:  # (B, 3, 128, 128) in [-1, 1] -> (B, F = 256)
        """Pooled features, also good for a Frechet distance between sets of pictures."""
        maps = self.body(functional.adaptive_avg_pool2d(pixels, SIZE))
        return torch.cat([maps.mean(dim=(2, 3)), maps.amax(dim=(2, 3))], dim=1)

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:  # (B, 3, 128, 128) in [-1, 1] -> name: (B, values)
        features = self.features(pixels)
        return {name: head(features) for name, head in self.heads.items()}

    @torch.no_grad()
    def predict(self, pixels: Tensor) -> Tensor:  # (B, 3, 128, 128) in [-1, 1] -> (B, 7) indices into ATTRIBUTES
        return torch.stack([logits.argmax(1) for logits in self(pixels).values()], dim=1)


def load_judge(path: Path = FILE) -> Judge:
    """The trained judge in float32, ready to read pictures."""
    judge = Judge().eval().requires_grad_(False)
    judge.load_state_dict({key: value.float() for key, value in load_file(path).items()}, strict=False)
    return judge


def right(judge: Judge, pixels: Tensor, rows: np.ndarray | Tensor) -> Tensor:  # -> (B, 7) bool
    """Which attributes of pictures (B, 3, 128, 128) are read as the true ones, `rows` (B, 7)."""
    where = next(judge.parameters()).device
    read = torch.cat([judge.predict(part.to(where).float()) for part in pixels.split(64)])
    return read.cpu() == torch.as_tensor(rows)


def scores(hits: Tensor) -> dict[str, float]:  # (B, 7) bool
    """Share of pictures with each attribute right, their mean, and the share with all of them right."""
    shares = dict(zip(ATTRIBUTES, hits.float().mean(0).tolist(), strict=True))
    return shares | {"mean": hits.float().mean().item(), "all": hits.all(1).float().mean().item()}


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

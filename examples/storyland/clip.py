"""Train a tiny CLIP on Storyland pictures and captions (B pairs); its halves become the demo's vision and text encoder.

Contrastive learning from scratch is slow, so linear heads also read the attributes from the pooled image embedding and
from the mean of the patch states that LLaVA will look at (layer -2); the heads are thrown away.
"""

from __future__ import annotations

from pathlib import Path

import click
import numpy as np
import torch
from fit import Run, device, fit, step_generator
from PIL import Image
from renders import renders, scenes, scores
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from mgp5.storyland.tell import caption
from mgp5.storyland.world import ATTRIBUTES, rng

SIZE = 96  # pixels of the vision encoder


class Pair(nn.Module):
    """CLIP and its throw-away attribute heads."""

    def __init__(self, clip: CLIPModel) -> None:
        super().__init__()
        self.clip = clip
        values = sum(map(len, ATTRIBUTES.values()))
        self.pooled = nn.Linear(clip.config.projection_dim, values)
        self.patches = nn.Linear(clip.config.vision_config.hidden_size, values)

    def images(self, pixels: Tensor) -> tuple[Tensor, Tensor]:  # (B, 3, 96, 96) -> (B, 128), (B, 192)
        """Projected image embedding and mean patch state of layer -2."""
        out = self.clip.vision_model(pixel_values=pixels, output_hidden_states=True)
        return self.clip.visual_projection(out.pooler_output), out.hidden_states[-2][:, 1:].mean(1)

    def texts(self, ids: Tensor) -> Tensor:  # (B, T) -> (B, 128)
        return self.clip.text_projection(self.clip.text_model(input_ids=ids).pooler_output)


def new_clip(tokenizer: CLIPTokenizer) -> CLIPModel:
    """2.6M parameters: text 2 layers of 128, vision 4 layers of 192 on 36 patches, one shared space of 128."""
    marks = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    text = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4}
    text |= {"vocab_size": len(tokenizer), "max_position_embeddings": tokenizer.model_max_length, "projection_dim": 128}
    vision = {"hidden_size": 192, "intermediate_size": 768, "num_hidden_layers": 4, "num_attention_heads": 6}
    vision |= {"image_size": SIZE, "patch_size": 16, "projection_dim": 128}
    return CLIPModel(CLIPConfig(text_config=text | marks, vision_config=vision, projection_dim=128))


def processor() -> CLIPImageProcessorPil:
    """What turns any picture into the vision encoder's input: 96 pixels, [-1, 1]."""
    half = [0.5, 0.5, 0.5]
    edge = {"shortest_edge": SIZE}
    return CLIPImageProcessorPil(size=edge, crop_size={"height": SIZE, "width": SIZE}, image_mean=half, image_std=half)


def small(work: Path, split: str, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Renders as the processor resizes them, (count, 96, 96, 3) uint8, kept on disk, and attributes (count, 7)."""
    path = work / f"{split}-{count}-{SIZE}.npy"
    pictures, rows = renders(work, split, count)
    if not path.exists():
        edge = (SIZE, SIZE)
        resized = [np.asarray(Image.fromarray(p).resize(edge, Image.Resampling.BICUBIC)) for p in pictures]
        np.save(path, np.stack(resized))
    return np.load(path, mmap_mode="r"), rows


def to_vision(pictures: np.ndarray) -> Tensor:
    """uint8 pictures (B, 96, 96, 3) -> (B, 3, 96, 96) in [-1, 1], equal to what the processor gives."""
    return torch.from_numpy(np.ascontiguousarray(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1


def captions(rows: np.ndarray, seed: int) -> list[str]:
    """A caption of each row of attributes (B, 7)."""
    return [caption(scene, rng("clip", seed, index)) for index, scene in enumerate(scenes(rows))]


def disturb(pixels: Tensor, generator: torch.Generator) -> Tensor:  # (B, 3, 96, 96)
    """A shift of up to 4 pixels, a little noise, and a soft picture now and then, as generated ones are."""
    dx, dy, soft = torch.randint(0, 9, (3,), generator=generator).tolist()
    pixels = functional.pad(pixels, (4, 4, 4, 4), mode="replicate")[..., dy : dy + SIZE, dx : dx + SIZE]
    if soft < 3:
        pixels = functional.interpolate(functional.avg_pool2d(pixels, 2), scale_factor=2, mode="bilinear")
    return pixels + 0.05 * torch.randn(pixels.shape, generator=generator).to(pixels.device)


def heads_loss(logits: Tensor, rows: Tensor) -> Tensor:  # (B, values), (B, 7)
    """Mean cross-entropy of the attributes."""
    parts = logits.float().split([len(values) for values in ATTRIBUTES.values()], dim=1)
    return torch.stack([functional.cross_entropy(part, rows[:, i]) for i, part in enumerate(parts)]).mean()


def reads(logits: Tensor, rows: Tensor) -> Tensor:  # (B, values), (B, 7) -> (B, 7) bool
    parts = logits.split([len(values) for values in ATTRIBUTES.values()], dim=1)
    return torch.stack([part.argmax(1) for part in parts], 1) == rows


def contrast(images: Tensor, texts: Tensor, scale: Tensor) -> Tensor:  # (B, C), (B, C)
    """The symmetric loss of CLIP."""
    images, texts = functional.normalize(images.float(), dim=-1), functional.normalize(texts.float(), dim=-1)
    logits = scale.exp().clamp(max=100) * images @ texts.T
    truth = torch.arange(len(logits), device=logits.device)
    return (functional.cross_entropy(logits, truth) + functional.cross_entropy(logits.T, truth)) / 2


@torch.no_grad()
def measure(pair: Pair, pixels: Tensor, rows: np.ndarray, ids: Tensor) -> dict[str, float]:
    """Attribute accuracy of both heads, and how often the right one of all captions is found for a picture."""
    pooled, patches = (torch.cat(out) for out in zip(*map(pair.images, pixels.to(device()).split(128)), strict=True))
    texts = functional.normalize(pair.texts(ids.to(device())), dim=-1)
    order = (functional.normalize(pooled, dim=-1) @ texts.T).argsort(1, descending=True)
    place = (order == torch.arange(len(order), device=order.device)[:, None]).int().argmax(1)
    truth = torch.as_tensor(rows, device=order.device)
    report = {"top1": (place == 0).float().mean().item(), "top5": (place < 5).float().mean().item()}
    report |= {f"pooled {name}": value for name, value in scores(reads(pair.pooled(pooled), truth).cpu()).items()}
    return report | {f"patches {key}": v for key, v in scores(reads(pair.patches(patches), truth).cpu()).items()}


@click.command()
@click.option("--work", type=click.Path(path_type=Path), required=True, help="Folder for renders, logs and states.")
@click.option("--steps", default=1800)
@click.option("--minutes", default=1e9, help="Stop after this time; the next call goes on.")
@click.option("--batch", default=64)
@click.option("--lr", default=1e-3)
@click.option("--threads", default=0, help="CPU threads; 0 = all.")
@click.option("--train", "amount", default=20000, help="Number of training renders.")
def main(work: Path, steps: int, minutes: float, batch: int, lr: float, threads: int, amount: int) -> None:
    if threads:
        torch.set_num_threads(threads)
    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(work / "diffusion" / "tokenizer")
    pictures, rows = small(work, "train", amount)
    test, test_rows = small(work, "test", 512)
    pair = Pair(new_clip(tokenizer)).to(device())

    def encode(texts: list[str]) -> Tensor:
        return tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids

    def loss(step: int) -> dict[str, Tensor]:
        generator = step_generator(step, 4)
        chosen = torch.randint(len(pictures), (batch,), generator=generator).numpy()
        pooled, patches = pair.images(disturb(to_vision(pictures[chosen]).to(device()), generator))
        texts = pair.texts(encode(captions(rows[chosen], step)).to(device()))
        truth = torch.from_numpy(rows[chosen]).to(device())
        terms = {"contrast": 0.3 * contrast(pooled, texts, pair.clip.logit_scale)}
        return terms | {
            "pooled": heads_loss(pair.pooled(pooled), truth),
            "patches": heads_loss(pair.patches(patches), truth),
        }

    test_ids = encode(captions(test_rows, -1))

    def evaluate(model: nn.Module) -> dict[str, float]:
        return measure(model, to_vision(test), test_rows, test_ids)

    run = Run(name="clip-pair", work=work, steps=steps, lr=lr, minutes=minutes, ema=0.99, warmup=100, decay=0.5)
    average = fit(run, pair, loss, evaluate, 200)
    average.clip.save_pretrained(work / "clip")
    average.clip.text_model.save_pretrained(work / "diffusion" / "text_encoder")
    processor().save_pretrained(work / "mllm")
    click.echo(" ".join(f"{key} {value:.4f}" for key, value in evaluate(average).items()))


if __name__ == "__main__":
    main()

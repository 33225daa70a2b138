"""What a model of any head makes of Storyland's test pictures (B pictures): of captions and of pictures, and where its
head has codes (K of an image) through codes and back.

A judge reads the seven attributes of pictures. Of all numbers the table has the mean; retrieval is among B captions.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import click
import torch
from PIL import Image as pil
from renders import scores
from rich.progress import track
from torch import Tensor

from mgp5.apps.open_model import load
from mgp5.events import Finished
from mgp5.generators.vqvae import CONFIG, VQVAE
from mgp5.heads.batch import from_pixels, to_pixels
from mgp5.heads.seed import SeedHead
from mgp5.inference.reply import generate_batch
from mgp5.messages import Conversation, Image
from mgp5.model import InterleavedModel
from mgp5.options import reply_options
from mgp5.prompts import illustrate, narrate
from mgp5.storyland.draw import draw
from mgp5.storyland.judge import Judge, load_judge, look
from mgp5.storyland.language import mentions
from mgp5.storyland.metrics import attributes_right
from mgp5.storyland.tell import caption
from mgp5.storyland.world import Scene, random_scene, rng
from mgp5.views import tables

SIDE = 128  # pixels of a render, which the judge reads
ALONE = 10  # images that are drawn one by one


class World(NamedTuple):
    """Scenes of combinations that training never shows, with a picture and a caption of each."""

    scenes: list[Scene]
    pictures: list[pil.Image]
    captions: list[str]

    @classmethod
    def of(cls, count: int) -> World:
        scenes = [random_scene(rng("test", 1, index), "test") for index in range(count)]
        pictures = [draw(scene, rng("test", 2, index).getrandbits(31)) for index, scene in enumerate(scenes)]
        return cls(scenes, pictures, [caption(scene, rng("test", 3, index)) for index, scene in enumerate(scenes)])


class Coder(NamedTuple):
    """Pictures to codes and back."""

    codes: int  # how many different ones there are
    encode: Callable[[list[pil.Image]], Tensor]  # (B, K)
    paint: Callable[[Tensor], Tensor]  # (B, K) -> (B, 3, H, W) in [-1, 1]


def tokens(model: InterleavedModel, pictures: list[pil.Image]) -> Tensor:  # (B, S, V), of the vision tower
    return model.backbone.vision_tokens(model.backbone.preprocess(pictures))


def paint(model: InterleavedModel, condition: Tensor, steps: int) -> Tensor:  # (B, L, C) -> (B, 3, H, W) in [-1, 1]
    head, seeds = model.head, [torch.Generator().manual_seed(number) for number in range(len(condition))]
    options = {"guidance": model.config.guidance, "steps": steps, "sampler": head.spec.image_options().sampler}
    *_, latents = head.generator.draw(condition, head.unconditional(condition), generators=seeds, **options)
    return head.generator.decode(latents)


def coder_of(model: InterleavedModel | VQVAE, steps: int) -> Coder | None:
    """The codes of a SEED, or of a VQ-VAE, which may be that of a VARGPT; None of others."""
    head = getattr(model, "head", None)
    if isinstance(vqvae := model if head is None else head.generator, VQVAE):

        def encode(pictures: list[pil.Image]) -> Tensor:
            return vqvae.encode(torch.stack([to_pixels(picture, (vqvae.native_size,) * 2) for picture in pictures]))

        return Coder(vqvae.config.num_codes, encode, lambda codes: vqvae.decode(vqvae.quantizer.f_hat(codes)))
    if not isinstance(head, SeedHead):
        return None

    def imagine(codes: Tensor) -> Tensor:
        return paint(model, head.condition(codes), steps)

    return Coder(head.config.tokenizer.codes, lambda pictures: head.tokenizer.encode(tokens(model, pictures)), imagine)


def judged(judge: Judge, pictures: list[pil.Image], scenes: list[Scene]) -> dict[str, float]:  # shares read right
    pixels = torch.stack([to_pixels(picture.convert("RGB"), (SIDE, SIDE)) for picture in pictures])
    return scores(attributes_right(look(judge, pixels)[0], scenes))


@torch.inference_mode()
def reconstruction(coder: Coder, judge: Judge, world: World, batch: int) -> dict[str, Any]:
    """Pictures to codes, to images, and to codes again."""
    codes, drawn, again, reading, painting = [], [], [], 0.0, 0.0
    for start in track(range(0, len(world.pictures), batch), "through codes and back"):
        began = time.perf_counter()
        codes.append(coder.encode(world.pictures[start : start + batch]))
        reading, began = reading + time.perf_counter() - began, time.perf_counter()
        drawn += [from_pixels(pixels) for pixels in coder.paint(codes[-1]).float()]
        painting += time.perf_counter() - began
        again.append(coder.encode(drawn[start:]))
    found, side = torch.cat(codes), (drawn[0].height, drawn[0].width)
    pairs = [[to_pixels(picture, side) for picture in pair] for pair in zip(world.pictures, drawn, strict=True)]
    errors = torch.stack([((one - other) / 2).square().mean() for one, other in pairs])
    counts = torch.bincount(found.flatten(), minlength=coder.codes).float()
    shares = counts / counts.sum()
    return {
        "attributes, through codes and back": judged(judge, drawn, world.scenes),
        "codes that are the same after drawing": (torch.cat(again) == found).float().mean().item(),
        "PSNR, dB": -10 * errors.log10().mean().item(),
        "share of the codebook in use": (counts > 0).float().mean().item(),
        "perplexity of the codes": torch.exp(-(shares * shares.clamp(min=1e-12).log()).sum()).item(),
        "images a second, to codes": len(drawn) / reading,
        "seconds an image, of codes": painting / len(drawn),
    }


@torch.inference_mode()
def retrieval(model: InterleavedModel, world: World, batch: int) -> dict[str, float]:
    """Recall of captions by pictures and of pictures by captions (SEED, table 1), by causal embeddings and by codes."""
    head, captions = model.head, world.captions
    causal, parts = head.tokenizer.causal, {"causal embeddings": [], "codes": []}
    for start in range(0, len(captions), batch):
        features = tokens(model, world.pictures[start : start + batch])
        parts["causal embeddings"].append(causal.image_features(head.tokenizer.embeddings(features)))
        parts["codes"].append(causal.image_features(head.tokenizer.reconstruct(head.tokenizer.encode(features))))
    texts = causal.text_features(*head.texts(tuple(captions), 32, head.device))
    same, found = torch.tensor([[one == other for other in captions] for one in captions]), {}  # some are told alike
    for name, features in parts.items():
        alike = (torch.cat(features) @ texts.T).cpu()
        for way, scored in (("image to text", alike), ("text to image", alike.T)):
            best = scored.argsort(1, descending=True)
            for count in (1, 5):
                hits = same.gather(1, best[:, :count]).any(1).float()
                found[f"retrieval by {name}, {way}, R@{count}"] = hits.mean().item()
    return found


def replies(model: InterleavedModel, asked: list[Conversation], batch: int, **values: Any) -> list[Any]:
    """What the model says or draws, `batch` at a time; text is the most likely one."""
    options, messages = reply_options(model.head.spec.image_options, temperature=0.0, **values), []
    for start in track(range(0, len(asked), batch), "replies"):
        events = generate_batch(model, asked[start : start + batch], options)
        messages += [message for _, message in sorted((i, e.message) for i, e in events if isinstance(e, Finished))]
    return messages


@torch.inference_mode()
def words(model: InterleavedModel, judge: Judge, world: World, batch: int, steps: int) -> dict[str, Any]:
    """Pictures of captions, and what narrations of pictures say."""
    ask = {"image": "always", "max_tokens": 0, "max_images": 1}
    ask |= {"steps": steps} if hasattr(model.head.spec.image_options(), "steps") else {}
    captions, began = [illustrate([], text) for text in world.captions], time.perf_counter()
    drawn = [message.images[0].load() for message in replies(model, captions, batch, **ask)]
    together, began = (time.perf_counter() - began) / len(drawn), time.perf_counter()
    alone = len(replies(model, captions[:ALONE], 1, **ask)) / (time.perf_counter() - began)
    asked = [narrate([], Image(pixels=picture)) for picture in world.pictures]
    told = [mentions(message.text) for message in replies(model, asked, batch, image="never", max_tokens=48)]
    true = [scene.attributes() for scene in world.scenes]
    right = [said[name] == truth[name] for said, truth in zip(told, true, strict=True) for name in said]
    return {
        "attributes, drawn from the caption": judged(judge, drawn, world.scenes),
        "seconds an image": together,
        "seconds an image, alone": 1 / alone,
        "attributes that a narration mentions, right": sum(right) / max(1, len(right)),
        "attributes that a narration mentions": len(right) / len(true),
    }


@click.command()
@click.option("--model", required=True, help="A name, a run of mgp5 train, a packed model, or the folder of a VQ-VAE.")
@click.option("--pictures", default=500, show_default=True, help="B, from the test split.")
@click.option("--batch", default=16, show_default=True)
@click.option("--steps", default=20, show_default=True, help="Denoising steps, where the head has them.")
@click.option("--guidance", type=float, help="Not the model's own: Storyland wants 1.5, not 7.5.")
@click.option("--tokenizer-only", is_flag=True, help="Leave out what the LLM is asked for.")
@click.option("--out", type=click.Path(path_type=Path), help="JSON file.")
def main(
    model: str,
    pictures: int,
    batch: int,
    steps: int,
    guidance: float | None,
    tokenizer_only: bool,
    out: Path | None,
) -> None:
    """Measure a model on test pictures of Storyland."""
    whole = not (Path(model) / CONFIG).is_file()
    opened = load(model, backend=None) if whole else VQVAE.load(model).eval()
    if whole and guidance is not None:
        opened.config = replace(opened.config, guidance=guidance)
    judge, world, found = load_judge(), World.of(pictures), {"model": model, "pictures": pictures}
    if coder := coder_of(opened, steps):
        found |= reconstruction(coder, judge, world, batch)
    if whole and isinstance(opened.head, SeedHead):
        found |= retrieval(opened, world, batch)
    if whole and not tokenizer_only:
        found |= words(opened, judge, world, batch, steps)
    if out:
        out.write_text(json.dumps(found, indent=2) + "\n")
    shown = {name: value["mean"] if isinstance(value, dict) else value for name, value in found.items()}
    rows = [[name, value if isinstance(value, str) else f"{value:.4g}"] for name, value in shown.items()]
    tables.show(tables.table("", ["", "found"], rows))


if __name__ == "__main__":
    main()

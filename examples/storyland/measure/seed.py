"""What SEED's head makes of Storyland's test pictures: through codes and back, and codes and words (B pictures).

A judge reads the seven attributes of pictures. Of all numbers the report has the mean; retrieval is among B captions.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import click
import torch
from PIL import Image as pil
from renders import scores
from rich.progress import track
from torch import Tensor

from mgp5.apps.open_model import load
from mgp5.events import Finished
from mgp5.heads.seed import SeedHead
from mgp5.inference.reply import generate_batch
from mgp5.inference.request import to_image
from mgp5.messages import Conversation, Image
from mgp5.model import InterleavedModel
from mgp5.options import SeedOptions, reply_options
from mgp5.prompts import illustrate, narrate
from mgp5.storyland.draw import draw
from mgp5.storyland.judge import Judge, load_judge, look
from mgp5.storyland.language import mentions
from mgp5.storyland.metrics import attributes_right
from mgp5.storyland.tell import caption
from mgp5.storyland.world import Scene, random_scene, rng

SIDE = 128  # pixels of a render, which the judge reads


def world(count: int) -> tuple[list[Scene], list[pil.Image], list[str]]:
    """Scenes of combinations that training never shows, with a picture and a caption of each."""
    scenes = [random_scene(rng("test", 1, index), "test") for index in range(count)]
    pictures = [draw(scene, rng("test", 2, index).getrandbits(31)) for index, scene in enumerate(scenes)]
    return scenes, pictures, [caption(scene, rng("test", 3, index)) for index, scene in enumerate(scenes)]


def tokens(model: InterleavedModel, pictures: list[pil.Image]) -> Tensor:  # (B, S, V)
    """What the vision tower gives of pictures."""
    return model.backbone.vision_tokens(model.backbone.preprocess(pictures))


@torch.inference_mode()
def paint(head: SeedHead, codes: Tensor, guidance: float, steps: int) -> Tensor:  # (B, 3, H, W) in [-1, 1]
    """Draw images of codes (B, K), each with a seed of its own."""
    condition = head.condition(codes)
    seeds = [torch.Generator().manual_seed(number) for number in range(len(codes))]
    options = {"guidance": guidance, "steps": steps, "sampler": SeedOptions().sampler}
    *_, latents = head.generator.draw(condition, head.unconditional(condition), generators=seeds, **options)
    return head.generator.decode(latents)


def judged(judge: Judge, pixels: Tensor, scenes: list[Scene]) -> dict[str, float]:
    """Shares of attributes that are read right in pixels (B, 3, H, W)."""
    pixels = torch.nn.functional.interpolate(pixels, (SIDE, SIDE), mode="bilinear", antialias=True)
    return scores(attributes_right(look(judge, pixels)[0], scenes))


def pixels_of(images: list[Image]) -> Tensor:  # (B, 3, SIDE, SIDE)
    """Images as the judge reads them."""
    resized = [torch.tensor(list(image.load().convert("RGB").resize((SIDE, SIDE)).tobytes())) for image in images]
    return torch.stack(resized).view(-1, SIDE, SIDE, 3).permute(0, 3, 1, 2) / 127.5 - 1


def reconstruction(model: InterleavedModel, judge: Judge, given: tuple, batch: int, steps: int) -> dict[str, Any]:
    """Pictures to codes, codes to pictures and to codes again."""
    head, (scenes, pictures, _) = model.head, given
    hits, same, found, seconds = [], [], [], 0.0
    for start in track(range(0, len(pictures), batch), "through codes and back"):
        codes = head.tokenizer.encode(tokens(model, pictures[start : start + batch]))
        began = time.perf_counter()
        drawn = paint(head, codes, model.config.guidance, steps)
        seconds += time.perf_counter() - began
        again = head.tokenizer.encode(tokens(model, [to_image(image).load() for image in drawn]))
        hits.append(drawn.cpu())
        same.append((again == codes).float().cpu())
        found.append(codes.cpu())
    codes = torch.cat(found)
    counts = torch.bincount(codes.flatten(), minlength=model.head.config.tokenizer.codes).float()
    shares = counts / counts.sum()
    return {
        "attributes, through codes and back": judged(judge, torch.cat(hits), scenes),
        "codes that are the same after drawing": torch.cat(same).mean().item(),
        "share of the codebook in use": (counts > 0).float().mean().item(),
        "perplexity of the codes": torch.exp(-(shares * shares.clamp(min=1e-12).log()).sum()).item(),
        "seconds an image": seconds / len(pictures),
    }


@torch.inference_mode()
def retrieval(model: InterleavedModel, given: tuple, batch: int) -> dict[str, dict[str, float]]:
    """Recall of captions by pictures and of pictures by captions (SEED, table 1), by causal embeddings and by codes."""
    head, (_, pictures, captions) = model.head, given
    causal, parts = head.tokenizer.causal, {"causal embeddings": [], "codes": []}
    for start in range(0, len(pictures), batch):
        features = tokens(model, pictures[start : start + batch])
        parts["causal embeddings"].append(causal.image_features(head.tokenizer.embeddings(features)))
        parts["codes"].append(causal.image_features(head.tokenizer.reconstruct(head.tokenizer.encode(features))))
    texts = causal.text_features(*head.texts(tuple(captions), 32, head.device))
    same = torch.tensor([[one == other for other in captions] for one in captions])  # two scenes may be told alike
    rows = {}
    for name, features in parts.items():
        alike = (torch.cat(features) @ texts.T).cpu()
        rows[name] = {}
        for way, scored in (("image to text", alike), ("text to image", alike.T)):
            best = scored.argsort(1, descending=True)
            for count in (1, 5):
                rows[name][f"{way}, R@{count}"] = same.gather(1, best[:, :count]).any(1).float().mean().item()
    return rows


def replies(model: InterleavedModel, asked: list[Conversation], batch: int, **values: Any) -> list[Any]:
    """What the model says or draws, `batch` at a time; text is the most likely one."""
    options, messages = reply_options(SeedOptions, temperature=0.0, **values), []
    for start in track(range(0, len(asked), batch), "replies"):
        events = generate_batch(model, asked[start : start + batch], options)
        messages += [message for _, message in sorted((i, e.message) for i, e in events if isinstance(e, Finished))]
    return messages


@torch.inference_mode()
def words(model: InterleavedModel, judge: Judge, given: tuple, batch: int, steps: int) -> dict[str, Any]:
    """Pictures of captions, and what narrations of pictures say."""
    scenes, pictures, captions = given
    ask = {"image": "always", "max_tokens": 0, "max_images": 1, "steps": steps}
    drawn = replies(model, [illustrate([], text) for text in captions], batch, **ask)
    pixels = pixels_of([message.images[0] for message in drawn])
    asked = [narrate([], Image(pixels=picture)) for picture in pictures]
    told = [mentions(message.text) for message in replies(model, asked, batch, image="never", max_tokens=48)]
    true = [scene.attributes() for scene in scenes]
    right = [said[name] == truth[name] for said, truth in zip(told, true, strict=True) for name in said]
    return {
        "attributes, drawn from the caption": judged(judge, pixels, scenes),
        "attributes that a narration mentions, right": sum(right) / max(1, len(right)),
        "attributes that a narration mentions": len(right) / len(scenes),
    }


@click.command()
@click.option("--model", required=True, help="A run of mgp5 train, or a packed model.")
@click.option("--pictures", default=500, show_default=True, help="B, from the test split.")
@click.option("--batch", default=16, show_default=True)
@click.option("--steps", default=20, show_default=True, help="Denoising steps.")
@click.option("--tokenizer-only", is_flag=True, help="Leave out what the LLM is asked for.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="JSON file.")
def main(model: str, pictures: int, batch: int, steps: int, tokenizer_only: bool, out: Path) -> None:
    """Measure a model with the head of SEED on test pictures of Storyland."""
    opened, judge, given = load(model, backend=None), load_judge(), world(pictures)
    if not isinstance(opened.head, SeedHead):
        raise click.UsageError(f"{model} has the head {opened.head.spec.name}, expected seed")
    found = {"model": model, "pictures": pictures, "retrieval": retrieval(opened, given, batch)}
    found |= reconstruction(opened, judge, given, batch, steps)
    if not tokenizer_only:
        found |= words(opened, judge, given, batch, steps)
    out.write_text(json.dumps(found, indent=2) + "\n")
    click.echo(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()

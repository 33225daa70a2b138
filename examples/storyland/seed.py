"""Train demo-seed's tokenizer from kept vision tokens, after `mgp5 train --stage tokenizer-contrastive`.

First that stage goes on with harder batches: scenes that share species, colour and place, so that what is small, such
as a prop, tells them apart. Then the Q-Former is frozen, as in the paper, and what follows learns the condition: the
encode layer begins by whitening the embeddings, which differ little between images, and has noise in place of the
quantizer, so that it spreads what the condition needs; at last the codebook is found by k-means, and the losses are the
paper's.

Letters: B pictures, S vision tokens of width V, K embeddings of width W, a condition of L rows of width C.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import click
import numpy as np
import torch
from fit import Run, fit, step_generator
from measure.head import World, coder_of, judged, paint, reconstruction
from PIL import Image
from renders import renders, scenes
from rich.progress import track
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional

from mgp5.files import replacing
from mgp5.generators.seed_stages import contrastive_loss
from mgp5.generators.seed_tokenizer import SeedTokenizer
from mgp5.heads.batch import from_pixels
from mgp5.hub import resolve
from mgp5.loading import load_checkpoint, save_checkpoint
from mgp5.model import InterleavedModel
from mgp5.storyland.judge import load_judge
from mgp5.storyland.tell import caption
from mgp5.storyland.world import ATTRIBUTES, rng
from mgp5.training.presets import preset

NOISE = 0.2, 0.7  # at first and at last, over the deviation of what the quantizer will see
WEIGHTS = preset("tokenizer", "demo", "seed").tokenizer_weights
KIND = [list(ATTRIBUTES).index(name) for name in ("species", "colour", "place")]
SAMPLE = 4000  # pictures whose embeddings tell the first whitening, and the codebook
SHOWN = 48  # pictures that an evaluation draws
TOKENS = 32  # of a caption
GROUP = 16  # pictures of a batch that share species, colour and place
GUIDANCE = 1.5


@torch.no_grad()
def keep(model: InterleavedModel, work: Path, images: int) -> dict[str, Tensor]:
    """Vision tokens (B, S, V) of renders, with ids and mask of their captions (B, T) and the conditions (B, L, C) that
    they give. The captions are in the same words: a condition told in any of several ways can only be their mean."""
    path = work / f"seed-{images}.safetensors"
    if not path.exists():
        pictures, rows = renders(work, "train", images)
        told = [caption(scene, rng("train", 0, 0)) for scene in scenes(rows)]
        ids, mask = model.head.texts(tuple(told), TOKENS, model.head.device)
        features, conditions = [], []
        for start in track(range(0, images, 64), "vision tokens"):
            shown = [Image.fromarray(np.asarray(picture)) for picture in pictures[start : start + 64]]
            features.append(model.backbone.vision_tokens(model.backbone.preprocess(shown)).half())
            conditions.append(model.head.generator.encode_text(told[start : start + 64]).half())
        parts = {"features": torch.cat(features), "conditions": torch.cat(conditions), "ids": ids, "mask": mask}
        with replacing(path) as part:
            save_file(parts, part)
    return load_file(path)


@torch.no_grad()
def embed(tokenizer: SeedTokenizer, features: Tensor) -> Tensor:  # (B, S, V) -> (B, K, W)
    return torch.cat([tokenizer.embeddings(part.float()) for part in features.split(256)])


@torch.no_grad()
def whiten(tokenizer: SeedTokenizer, embeddings: Tensor) -> None:
    """Let the encode layer begin with embeddings of no mean and no correlation, of deviation 0.7: tanh follows."""
    rows = embeddings.flatten(0, 1)
    values, vectors = torch.linalg.eigh(torch.cov(rows.T))
    layer = tokenizer.encode_layer[0]
    layer.weight.copy_(0.7 * vectors @ torch.diag((values + 1e-3 * values.mean()).rsqrt()) @ vectors.T)
    layer.bias.copy_(-layer.weight @ rows.mean(0))


@torch.no_grad()
def find_codes(tokenizer: SeedTokenizer, embeddings: Tensor, generator: torch.Generator, rounds: int = 12) -> float:
    """Fill the codebook by k-means; return the share of the variance that its codes lose."""
    vectors, table = tokenizer.encode_layer(embeddings).flatten(0, 1), tokenizer.quantizer.codebook.weight
    count = len(table)

    def drawn() -> Tensor:
        return vectors[torch.randint(len(vectors), (count,), generator=generator)]

    table.copy_(drawn())
    for _ in range(rounds):
        nearest = torch.cat([torch.cdist(part, table).argmin(1) for part in vectors.split(16_000)])
        hits = torch.bincount(nearest, minlength=count).float()[:, None]
        sums = torch.zeros_like(table).index_add_(0, nearest, vectors)
        table.copy_(torch.where(hits > 0, sums / hits.clamp(min=1), drawn()))
    return float((vectors - table[nearest]).square().mean() / vectors.var(0).mean())


class Training:
    """Losses and tests of a tokenizer, in three parts: contrastive, with noise, with codes."""

    def __init__(self, model: InterleavedModel, work: Path, images: int, batch: int, parts: tuple[int, int]) -> None:
        self.model, self.batch, (self.sharp, self.noisy) = model, batch, parts
        self.tokenizer: SeedTokenizer = model.head.tokenizer
        kept = keep(model, work, images)
        self.features, self.conditions, self.ids, self.mask = map(kept.get, ("features", "conditions", "ids", "mask"))
        self.train = images - -(-images // 50)  # pictures; the others test
        rows = renders(work, "train", images)[1][: self.train, KIND]
        self.kinds = [np.flatnonzero((rows == kind).all(1)) for kind in np.unique(rows, axis=0)]
        self.embeddings: Tensor | None = None  # of all pictures, once they are frozen
        self.judge, self.world = load_judge(), World.of(SHOWN)

    def loss(self, step: int) -> dict[str, Tensor]:
        tokenizer, generator, after = self.tokenizer, step_generator(step, 5), step - self.sharp
        if after < 0:
            return {"contrastive": self.contrast(generator)}
        if self.embeddings is None:
            tokenizer.causal.requires_grad_(False)
            self.embeddings = embed(tokenizer, self.features)
        if after == 0:
            whiten(tokenizer, self.embeddings[:SAMPLE])
        chosen = torch.randint(self.train, (self.batch,), generator=generator)
        shown, target = self.embeddings[chosen], self.conditions[chosen].float()
        if after < self.noisy:
            vectors = tokenizer.encode_layer(shown)
            noise = NOISE[0] + (NOISE[1] - NOISE[0]) * after / self.noisy
            vectors = vectors + noise * vectors.detach().std() * torch.randn(vectors.shape, generator=generator)
            return {"condition": WEIGHTS[2] * functional.mse_loss(imagined(tokenizer, vectors), target)}
        if after == self.noisy:
            lost = find_codes(tokenizer, self.embeddings[:SAMPLE], generator)
            click.echo(f"codes lose {lost:.1%} of the variance", err=True)
        terms = tokenizer.code_losses(shown, target, WEIGHTS)
        return {name: value * weight for name, (value, weight) in terms.items() if weight}

    def contrast(self, generator: torch.Generator) -> Tensor:
        chosen = []
        for kind in torch.randint(len(self.kinds), (-(-self.batch // GROUP),), generator=generator).tolist():
            order = torch.randperm(len(self.kinds[kind]), generator=generator)[:GROUP].numpy()
            chosen.append(torch.from_numpy(self.kinds[kind][order]))
        at, causal = torch.cat(chosen), self.tokenizer.causal
        pictures = causal.image_features(causal(self.features[at].float()))
        told = causal.text_features(self.ids[at], self.mask[at])
        return contrastive_loss(pictures, told, causal.log_temperature.exp(), label_smoothing=0.0)

    @torch.no_grad()
    def evaluate(self, average: SeedTokenizer) -> dict[str, float]:
        """Errors of conditions without and with codes, and the attributes of what is drawn of either."""
        if self.embeddings is None:
            return {}
        average.causal.load_state_dict(self.tokenizer.causal.state_dict())
        vectors = average.encode_layer(self.embeddings[self.train :])
        coded = average.quantizer.codebook(average.quantizer.nearest(vectors))
        target, model = self.conditions[self.train :].float(), self.model
        errors = [functional.mse_loss(imagined(average, of), target).item() for of in (vectors, coded)]
        found, model.head.tokenizer = dict(zip(("without_codes", "with_codes"), errors, strict=True)), average
        seen = model.backbone.vision_tokens(model.backbone.preprocess(self.world.pictures))
        drawn = paint(model, imagined(average, average.encode_layer(embed(average, seen))), 10).float()
        found |= judged(self.judge, [from_pixels(pixels) for pixels in drawn], self.world.scenes)
        if errors[1] < 0.1:  # not before there are codes
            coded = reconstruction(coder_of(model, 10), self.judge, self.world, 16)
            found |= {f"coded_{name}": value for name, value in coded.pop("attributes, through codes and back").items()}
            found |= {name.partition(",")[0].replace(" ", "_"): value for name, value in coded.items()}
        model.head.tokenizer = self.tokenizer
        return found


def imagined(tokenizer: SeedTokenizer, vectors: Tensor) -> Tensor:  # (B, K, E) -> (B, L, C)
    return tokenizer.reverse(tokenizer.generation(tokenizer.decode_layer(vectors)))


@click.command()
@click.option("--work", type=click.Path(path_type=Path), required=True, help="Folder for renders, logs and states.")
@click.option("--model", "name", required=True, help="The run of the first stage, tokenizer-contrastive.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="The model with its tokenizer.")
@click.option("--steps", default=7500)
@click.option("--sharp", default=1200, help="Steps of those that are contrastive.")
@click.option("--noisy", default=4000, help="Steps after them with noise instead of codes.")
@click.option("--minutes", default=1e9, help="Stop after this time; the next call goes on.")
@click.option("--batch", default=64)
@click.option("--lr", default=1e-3)
@click.option("--images", default=20000, help="Number of renders; a fiftieth tests.")
@click.option("--compile", "compiled", is_flag=True, help="1.3 times as fast, with a C++ compiler.")
def main(
    work: Path,
    name: str,
    out: Path,
    steps: int,
    sharp: int,
    noisy: int,
    minutes: float,
    batch: int,
    lr: float,
    images: int,
    compiled: bool,
) -> None:
    torch.manual_seed(0)
    model = load_checkpoint(resolve(name))
    model.config = replace(model.config, guidance=GUIDANCE)
    tokenizer = model.head.tokenizer.train().requires_grad_(True)
    training = Training(model, work, images, batch, (sharp, noisy))
    if compiled:
        tokenizer.generation.compile()
        tokenizer.reverse.compile()
    run = Run(name="seed-tokenizer", work=work, steps=steps, lr=lr, minutes=minutes, warmup=100, ema=0.998)
    model.head.tokenizer = average = fit(run, tokenizer, training.loss, training.evaluate)
    average.causal.load_state_dict(tokenizer.causal.state_dict())
    save_checkpoint(model, out)


if __name__ == "__main__":
    main()

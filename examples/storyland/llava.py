"""Train the tiny LLaVA that reads and tells Storyland (B samples, T tokens, D width, P positions, V vocabulary).

It learns all text of the demo's three kinds of data. Throw-away heads see to it that its last hidden states know what
the image adapter needs later: whether a picture is due next, and all seven attributes of the scene it would show.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import click
import torch
from clip import SIZE, disturb, heads_loss, new_clip, processor, reads
from fit import Losses, Run, device, fit, step_generator
from lessons import Sample, lesson, pixels, sample, story_lesson
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import (
    AutoTokenizer,
    CLIPModel,
    CLIPTokenizer,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from mgp5.backbones.hf import HFBackbone
from mgp5.prompts import IGNORE
from mgp5.storyland.tell import story
from mgp5.storyland.world import ATTRIBUTES, rng

POOL = 8  # batches that are sorted by length together
REST = 0.2  # weight of text that is not the reply
VALUES = sum(map(len, ATTRIBUTES.values()))


class Reader(nn.Module):
    """LLaVA with the throw-away heads."""

    def __init__(self, llava: LlavaForConditionalGeneration) -> None:
        super().__init__()
        self.llava = llava
        width = llava.config.text_config.hidden_size
        self.scene = nn.Linear(width, VALUES)
        self.due = nn.Linear(width, 1)  # one more row of the LM head, as the first voken will be
        self.glance = nn.Linear(width, VALUES)  # reads the mean of a picture's features


def new_llava(work: Path, vocabulary: int, image_token: int) -> LlavaForConditionalGeneration:
    """5.2M parameters: six Llama layers of 192 and the vision tower of the demo's CLIP."""
    found = (work / "clip").exists()
    names = CLIPTokenizer.from_pretrained(work / "diffusion" / "tokenizer")
    tower = (CLIPModel.from_pretrained(work / "clip", dtype=torch.float32) if found else new_clip(names)).vision_model
    text = {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 6, "num_attention_heads": 6}
    text |= {"max_position_embeddings": 2048, "tie_word_embeddings": False, "vocab_size": vocabulary}
    text |= {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    config = LlavaConfig(
        text_config=LlamaConfig(**text),
        vision_config=CLIPVisionConfig(**tower.config.to_dict()),
        image_token_id=image_token,
        image_seq_length=(SIZE // tower.config.patch_size) ** 2,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        projector_hidden_act="gelu",
        tie_word_embeddings=False,
    )
    llava = LlavaForConditionalGeneration(config)
    target = llava.model.vision_tower
    getattr(target, "vision_model", target).load_state_dict(tower.state_dict())
    return llava


@dataclass(frozen=True)
class Batch:
    """Samples padded on the right; causal attention never looks there, so no mask is needed."""

    ids: Tensor  # (B, T)
    labels: Tensor  # (B, T)
    weights: Tensor  # (B, T) of the labels in the text loss
    pixels: Tensor  # (N, 3, 96, 96)
    seen: Tensor  # (N, 7) attributes of the pictures
    places: Tensor  # (P,) positions in the flattened batch where a scene is known
    scenes: Tensor  # (P, 7)


def collate(backbone: HFBackbone, samples: list[Sample]) -> Batch:
    width, pad = max(len(s.ids) for s in samples), backbone.tokenizer.pad_token_id
    images = [image for s in samples for image in s.pictures]
    states = [(row * width + t, scene.indices()) for row, s in enumerate(samples) for t, scene in s.states]
    parts = (
        torch.tensor([s.ids + [pad] * (width - len(s.ids)) for s in samples]),
        torch.tensor([s.labels + [IGNORE] * (width - len(s.ids)) for s in samples]),
        torch.tensor([[REST if t <= s.reply else 1.0 for t in range(width)] for s in samples]),
        pixels(images) if images else torch.zeros(0, 3, SIZE, SIZE),
        torch.tensor([image.meta["scene"] for image in images]).reshape(-1, 7),
        torch.tensor([place for place, _ in states]),
        torch.tensor([indices for _, indices in states]),
    )
    return Batch(*(part.to(device()) for part in parts))


def forward(backbone: HFBackbone, batch: Batch) -> tuple[Tensor, Tensor]:
    """Last hidden states (B, T, D) and picture features (N, S, D)."""
    # On a CPU the backward pass of plain attention takes a tenth of the time of the flash kernel's in bfloat16.
    with sdpa_kernel(SDPBackend.MATH):
        features = backbone.encode_images({"pixel_values": batch.pixels}) if len(batch.pixels) else []
        hidden = backbone.forward(backbone.embed(batch.ids, features), backbone.positions(batch.ids, None))
    return hidden, torch.stack(features) if features else hidden.new_zeros(0, 1, hidden.shape[-1])


def told_loss(reader: Reader, backbone: HFBackbone, hidden: Tensor, batch: Batch) -> Tensor:
    """Cross-entropy of the next token, where "a picture is due" is one more token; the reply counts most."""
    labels = batch.labels
    known = labels[:, 1:] != IGNORE  # (B, T - 1)
    states = hidden[:, :-1][known]
    logits = torch.cat([backbone.logits(states), reader.due(states)], dim=1)
    losses = functional.cross_entropy(logits.float(), labels[:, 1:][known], reduction="none")
    weights = batch.weights[:, 1:][known]
    return (losses * weights).sum() / weights.sum()


class Lessons:
    """Training batches by step: pools of POOL batches are sorted by length, so that little is padded."""

    def __init__(self, backbone: HFBackbone, size: int, seed: int) -> None:
        self.backbone, self.size, self.seed = backbone, size, seed
        self.pool: tuple[int, list[list[Sample]]] = (-1, [])

    def __call__(self, step: int) -> Batch:
        number, place = divmod(step, POOL)
        if self.pool[0] != number:
            first = number * POOL * self.size
            draws = (rng("train", self.seed, first + k) for k in range(POOL * self.size))
            samples = sorted((sample(self.backbone, lesson(r, "train")) for r in draws), key=lambda s: len(s.ids))
            batches = [samples[k : k + self.size] for k in range(0, len(samples), self.size)]
            rng("order", self.seed, number).shuffle(batches)
            self.pool = number, batches
        return collate(self.backbone, self.pool[1][place])


def exams(backbone: HFBackbone, amount: int) -> dict[str, list[Sample]]:
    """Test samples: pictures of steps 1 to 4 by how much of the story is shown, and everything mixed."""
    mixed = [sample(backbone, lesson(rng("test", 21, k), "test")) for k in range(amount)]
    sets = {"mixed": mixed}
    for context in ("full", "text", "none"):
        asked = [
            story_lesson(story(rng("test", 22, k), "test"), "illustrate", 1 + k % 4, k % 2, context)
            for k in range(amount)
        ]
        sets[context] = [sample(backbone, one) for one in asked]
    return sets


@torch.no_grad()
def examine(reader: Reader, backbone: HFBackbone, exams: dict[str, list[Sample]]) -> dict[str, float]:
    """Accuracy of the state heads where a picture is due, of "a picture is due" at ends of replies, and text loss."""
    own = HFBackbone(reader.llava, backbone.tokenizer, None)
    report: dict[str, float] = {}
    for name, samples in exams.items():
        rights, dues, losses = [], [], []
        for start in range(0, len(samples), 32):
            part = samples[start : start + 32]
            batch = collate(backbone, part)
            hidden, _ = forward(own, batch)
            ends = torch.stack([row[len(s.ids) - 2] for row, s in zip(hidden, part, strict=True)])
            told = torch.tensor([s.labels[-1] for s in part], device=device())
            if name == "mixed":
                losses.append(told_loss(reader, own, hidden, batch).item())
                dues.append((reader.due(ends)[:, 0] > own.logits(ends).amax(1)) == (told == len(backbone.tokenizer)))
            else:
                truth = torch.tensor([s.target.indices() for s in part], device=device())
                rights.append(reads(reader.scene(ends), truth))
        if rights:
            hits = torch.cat(rights).float()
            report[name] = hits.mean().item()
            report |= {f"{name} {key}": hits[:, i].mean().item() for i, key in enumerate(ATTRIBUTES)}
        else:
            report |= {"test told": sum(losses) / len(losses), "due": torch.cat(dues).float().mean().item()}
    return report


@click.command()
@click.option("--work", type=click.Path(path_type=Path), required=True, help="Folder with mllm (tokenizer) and clip.")
@click.option("--steps", default=4400)
@click.option("--minutes", default=1e9, help="Stop after this time; the next call goes on.")
@click.option("--batch", "size", default=16)
@click.option("--lr", default=1.5e-3)
@click.option("--threads", default=1, help="CPU threads; 0 = all.")
@click.option("--exam", default=128, help="Number of test samples of each kind.")
@click.option(
    "--begin", type=click.Path(path_type=Path), help="Train a finished LLaVA further, on lessons of their own."
)
def main(
    work: Path, steps: int, minutes: float, size: int, lr: float, threads: int, exam: int, begin: Path | None
) -> None:
    if threads:
        torch.set_num_threads(threads)
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(work / "mllm")
    if begin:
        llava = LlavaForConditionalGeneration.from_pretrained(begin, dtype=torch.float32)
    else:
        llava = new_llava(work, len(tokenizer), tokenizer.convert_tokens_to_ids("<image>"))
    reader = Reader(llava).to(device())
    backbone = HFBackbone(reader.llava, tokenizer, None)
    lessons, papers = Lessons(backbone, size, 120 if begin else 20), exams(backbone, exam)

    def loss(step: int) -> Losses:
        batch = lessons(step)
        seen = disturb(batch.pixels, step_generator(step, 5)) if len(batch.pixels) else batch.pixels
        hidden, features = forward(backbone, replace(batch, pixels=seen))
        states = hidden.flatten(0, 1)[batch.places]
        losses = {"told": told_loss(reader, backbone, hidden, batch)}
        losses["scene"] = 2 * heads_loss(reader.scene(states), batch.scenes)
        if len(seen):
            losses["glance"] = 0.5 * heads_loss(reader.glance(features.mean(1)), batch.seen)
        return losses

    def evaluate(model: Reader) -> dict[str, float]:
        return examine(model, backbone, papers)

    run = Run(name="llava", work=work, steps=steps, lr=lr, minutes=minutes, ema=0.995, warmup=100, decay=0.5)
    average = fit(run, reader, loss, evaluate, 200)
    average.llava.save_pretrained(work / "mllm")
    processor().save_pretrained(work / "mllm")
    report = examine(average, backbone, exams(backbone, 4 * exam))
    click.echo(" ".join(f"{key} {value:.4f}" for key, value in report.items()))


if __name__ == "__main__":
    main()

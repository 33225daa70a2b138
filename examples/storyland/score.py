"""Score a demo model on Storyland's test split: what it draws, when it draws, and what it tells (B pictures).

Pictures are judged by the judge of mgp5.evaluation, which has never seen the model. All choices are seeded; the numbers
of samples are in the report.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import numpy as np
import torch
from lessons import Lesson, dialog_lesson, scene_of, story_lesson
from PIL import Image as pil
from renders import to_pixels
from torch import Tensor

from mgp5.data.storyland.draw import draw
from mgp5.data.storyland.tell import accepts, caption, dialog, mentions, story
from mgp5.data.storyland.world import ATTRIBUTES, Scene, held_out, rng
from mgp5.evaluation.images import frechet_distance
from mgp5.evaluation.judge import load_judge, look
from mgp5.evaluation.storyland import attributes_right
from mgp5.events import Finished
from mgp5.generation import Options, generate
from mgp5.messages import Conversation, Image, Message, Text
from mgp5.model import MiniGPT5, load

CONDITIONS = {"no context": "none", "text context": "text", "text and images": "full"}
BATCH = 16
SHEET = 6  # stories on the contact sheet


@dataclass(frozen=True)
class Shot:
    """A picture to be drawn for a step of a test story."""

    story: int
    step: int  # from 1 to 4; step 0 has no history
    scene: Scene
    text: str
    truth: Image

    def ask(self, context: str) -> Conversation:
        """The question, with as much of the history as `context` says."""
        return asked(story_lesson(test_story(self.story), "illustrate", self.step, self.step % 2, context))


class Recorder:
    """A head that keeps the condition instead of drawing, so that many pictures can be drawn together."""

    def __init__(self, head: Any) -> None:
        self._head = head
        self.conditions: list[Tensor] = []  # of (1, L, C)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._head, name)

    def draw(self, condition: Tensor, options: Options, generators: list[torch.Generator]) -> Iterator[Tensor]:
        self.conditions.append(condition)
        yield torch.zeros(1)

    def finish(self, canvas: Tensor) -> Tensor:
        return torch.zeros(1, 3, 8, 8)


def test_story(index: int) -> Any:
    return story(rng("test", 31, index), "test")


def shots(stories: int) -> list[Shot]:
    """Steps 2 to 5 of the first test stories."""
    found = []
    for index in range(stories):
        told = test_story(index)
        for k, step in enumerate(told.steps[1:], start=1):
            found.append(Shot(index, k, step.scene, step.text, Image(pixels=draw(step.scene, told.seed + k))))
    return found


def asked(lesson: Lesson) -> Conversation:
    """The conversation without its last turn, all pictures drawn."""
    messages = []
    for message in lesson.conversation.messages[:-1]:
        parts = (_drawn(part) if isinstance(part, Image) else part for part in message.content)
        messages.append(Message(message.role, tuple(parts)))
    return Conversation(tuple(messages))


def _drawn(image: Image) -> Image:
    return replace(image, pixels=draw(scene_of(image), image.meta["seed"]))


def reply(model: MiniGPT5, conversation: Conversation, options: Options) -> tuple[Message, list[Tensor]]:
    """What the model answers, and the conditions of the pictures it would draw."""
    head = Recorder(model.head)
    view = SimpleNamespace(backbone=model.backbone, head=head, config=model.config, num_steps=lambda options: 1)
    *_, last = generate(view, conversation, options)
    assert isinstance(last, Finished)
    return last.message, head.conditions


def seeds(start: int, count: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(start + k) for k in range(count)]


@torch.inference_mode()
def paint(model: MiniGPT5, conditions: Tensor, options: Options, empty: Tensor | None = None) -> Tensor:
    """Conditions (B, L, C) -> pictures (B, 3, H, W) in [-1, 1], seeds 0, 1, ...; `empty` is guidance's other half."""
    empty = model.head.unconditional(conditions[:1]) if empty is None else empty
    done = []
    for start in range(0, len(conditions), BATCH):
        part = conditions[start : start + BATCH]
        *_, latents = model.diffusion.draw(
            part,
            empty,
            steps=options.steps,
            guidance=options.guidance,
            sampler=options.sampler,
            height=None,
            width=None,
            generators=seeds(start, len(part)),
        )
        done.append(model.diffusion.decode(latents).cpu())
    return torch.cat(done)


def illustrate(model: MiniGPT5, wanted: list[Shot], context: str, options: Options) -> Tensor:
    """Pictures (B, 3, H, W) of the shots by the illustrate task, the history being the true one."""
    ask = replace(options, image="always", max_images=1, temperature=0.0)
    return paint(model, torch.cat([reply(model, shot.ask(context), ask)[1][0] for shot in wanted]), options)


@torch.inference_mode()
def oracle(model: MiniGPT5, wanted: list[Shot], options: Options) -> Tensor:
    """Pictures (B, 3, H, W) from the diffusion model's own text encoder, told everything: the upper bound."""
    texts = [caption(shot.scene, rng("test", 32, k)) for k, shot in enumerate(wanted)]
    return paint(model, model.diffusion.encode_text(texts), options, model.diffusion.encode_text([""]))


def pixels(images: Iterable[Image]) -> Tensor:
    """Pictures as (B, 3, H, W) in [-1, 1]."""
    return to_pixels(np.stack([np.asarray(image.load()) for image in images]))


def verdict(judge: torch.nn.Module, pictures: Tensor, wanted: list[Shot]) -> dict[str, float]:
    """Shares of right attributes: each, all, those the sentence does not say, and on held-out scenes."""
    hits = attributes_right(look(judge, pictures)[0], [shot.scene for shot in wanted]).float()
    unsaid = torch.tensor([[name not in mentions(shot.text) for name in ATTRIBUTES] for shot in wanted])
    kept = torch.tensor([held_out(shot.scene) for shot in wanted])
    report = {"mean": hits.mean(), "all": hits.prod(1).mean(), "unsaid": hits[unsaid].mean(), "new": hits[kept].mean()}
    report |= {name: hits[:, i].mean() for i, name in enumerate(ATTRIBUTES)}
    return {key: round(value.item(), 4) for key, value in report.items()}


@torch.inference_mode()
def psnr(model: MiniGPT5, pictures: Tensor) -> float:
    """Mean peak signal-to-noise ratio in dB of VAE reconstructions."""
    back = torch.cat([model.diffusion.decode(model.diffusion.encode(part)).cpu() for part in pictures.split(BATCH)])
    error = ((back - pictures) / 2).square().flatten(1).mean(1)
    return float((-10 * error.log10()).mean())


def within(conversation: Conversation, context: str) -> Conversation:
    """A dialogue as far as `context` shows it: all of it, its texts, or only the last message's text."""
    if context == "full":
        return conversation
    shown = conversation.messages if context == "text" else (conversation.messages[0], conversation.messages[-1])
    texts = (replace(m, content=tuple(part for part in m.content if isinstance(part, Text))) for m in shown)
    return Conversation(tuple(m for m in texts if m.content))


def speech(model: MiniGPT5, stories: int, options: Options, context: str) -> dict[str, dict[str, float]]:
    """How often replies hold a picture, in dialogues and by task; how many sentences are Storyland's, and right."""
    found: dict[str, list[bool]] = {}
    for k in range(stories):
        told = dialog(rng("test", 33, k), "test")
        for turn in range(1, len(told.turns), 2):
            question = within(asked(dialog_lesson(told, turn)), context)
            message, _ = reply(model, question, replace(options, seed=k))
            due = "dialogue, due" if told.turns[turn].scene else "dialogue, not due"
            found.setdefault(due, []).append(bool(message.images))
    for k in range(stories):
        told = test_story(k)
        for step in range(1, len(told.steps)):
            for task in ("illustrate", "continue", "narrate"):
                question = asked(story_lesson(told, task, step, (k + step) % 2, context))
                message, _ = reply(model, question, replace(options, seed=5 * k + step))
                due = f"{task}, not due" if task == "narrate" else f"{task}, due"
                found.setdefault(due, []).append(bool(message.images))
                if task != "illustrate":
                    found.setdefault("sentences accepted", []).append(accepts(message.text))
                if task == "narrate":
                    after = replace(told.steps[step - 1].scene, **mentions(message.text))
                    found.setdefault("narrations that tell the picture", []).append(after == told.steps[step].scene)
    return {name: {"share": round(sum(rows) / len(rows), 4), "n": len(rows)} for name, rows in found.items()}


def sheet(pairs: list[tuple[Tensor, Tensor]], columns: int) -> pil.Image:
    """Ground truth beside the generated picture, `columns` pairs a row; pictures (3, H, W) in [-1, 1]."""
    size, gap = pairs[0][0].shape[-1], 8
    rows = -(-len(pairs) // columns)
    page = pil.new("RGB", (columns * (2 * size + gap) + gap, rows * (size + gap) + gap), "white")
    for k, pair in enumerate(pairs):
        for side, picture in enumerate(pair):
            array = picture.add(1).mul(127.5).round().clamp(0, 255).byte().permute(1, 2, 0).numpy()
            x, y = gap + k % columns * (2 * size + gap) + side * size, gap + k // columns * (size + gap)
            page.paste(pil.fromarray(array), (x, y))
    return page


def table(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    names = ["mean", "all", "unsaid", "new", *ATTRIBUTES]
    lines = [f"| pictures ({report['pictures']['n']}) | {' | '.join(names)} |", "|---|" + "--:|" * len(names)]
    for condition, row in report["pictures"].items():
        if condition != "n":
            lines.append(f"| {condition} | " + " | ".join(f"{100 * row[name]:.1f}" for name in names) + " |")
    replies = report["replies"]
    lines += ["", f"| replies | n | {' | '.join(replies)} |", "|---|--:|" + "--:|" * len(replies)]
    for name, row in next(iter(replies.values())).items():
        shares = " | ".join(f"{100 * by_name[name]['share']:.1f}" for by_name in replies.values())
        lines.append(f"| {name} | {row['n']} | {shares} |")
    lines += ["", f"VAE: {report['psnr']['value']:.2f} dB on {report['psnr']['n']} renders. "]
    near = report["frechet"]
    lines[-1] += f"Frechet distance {near['generated']:.2f} (real renders: {near['real']:.2f}, n = {near['n']})."
    return "\n".join(lines)


def score(model: MiniGPT5, stories: int, options: Options) -> tuple[dict[str, Any], pil.Image]:
    """The whole report, and the contact sheet."""
    judge, wanted = load_judge(), shots(stories)
    real = pixels(shot.truth for shot in wanted)
    again = pixels(Image(pixels=draw(shot.scene, 2**31 + k)) for k, shot in enumerate(wanted))
    pictures = {name: illustrate(model, wanted, context, options) for name, context in CONDITIONS.items()}
    made = pictures["text and images"]
    pictures |= {"caption of everything": oracle(model, wanted, options), "real renders": real}
    known = look(judge, real)[1]
    report: dict[str, Any] = {
        "options": {"steps": options.steps, "guidance": options.guidance, "sampler": options.sampler},
        "pictures": {"n": len(wanted)} | {name: verdict(judge, p, wanted) for name, p in pictures.items()},
        "replies": {name: speech(model, stories, options, context) for name, context in CONDITIONS.items()},
        "psnr": {"value": round(psnr(model, real), 3), "n": len(real)},
        "frechet": {
            "generated": round(frechet_distance(look(judge, made)[1], known), 4),
            "real": round(frechet_distance(look(judge, again)[1], known), 4),
            "n": len(wanted),
        },
    }
    return report, sheet(list(zip(real, made, strict=True))[: 4 * SHEET], 4)


@click.command()
@click.option("--model", "name", default="demo", help="Name or folder of the model.")
@click.option("--stories", default=32, help="Test stories, of four pictures each, and test dialogues.")
@click.option("--steps", default=20, help="Denoising steps.")
@click.option("--guidance", type=float, help="Scale of guidance; the model's own if not given.")
@click.option("--threads", default=0, help="CPU threads; 0 = all.")
@click.option(
    "--out", type=click.Path(path_type=Path), default=Path("score.json"), help="Report; the sheet is its .png."
)
def main(name: str, stories: int, steps: int, guidance: float | None, threads: int, out: Path) -> None:
    if threads:
        torch.set_num_threads(threads)
    model = load(name)
    guidance = model.config.guidance if guidance is None else guidance
    report, page = score(model, stories, Options(steps=steps, guidance=guidance))
    out.write_text(json.dumps(report, indent=2) + "\n")
    page.save(out.with_suffix(".png"))
    click.echo(table(report))


if __name__ == "__main__":
    main()

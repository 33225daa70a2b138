"""What tests of heads share: replies that draw, batches that are as alone, stages that train, resume and load."""

from collections.abc import Sequence
from pathlib import Path

import torch

from mgp5.events import Finished
from mgp5.hub import resolve
from mgp5.inference.reply import generate, generate_batch
from mgp5.loading import load_checkpoint, save_checkpoint, trained_tensors
from mgp5.messages import Conversation, Image, Message
from mgp5.model import InterleavedModel
from mgp5.options import Options
from mgp5.training.loop import train


def force_images(model: InterleavedModel) -> None:
    """Let the LLM begin an image wherever it may."""
    bonus = torch.zeros(len(model.backbone.lm_head.weight))
    bonus[model.head.ids[0]] = 1e4
    model.backbone.lm_head.register_forward_hook(lambda module, args, logits: logits + bonus)


def after_text(model: InterleavedModel, tokens: int) -> None:
    """Let the LLM begin an image after so many tokens of text since the reply or the last image began."""
    bonus, count, commit = torch.zeros(2, len(model.backbone.lm_head.weight)), [], model.head.commit
    bonus[0, model.backbone.tokenizer.encode("b")[-1]] = bonus[1, model.head.ids[0]] = 1e4

    def logits(module, args, values):
        count.append(1)
        return values + bonus[int(len(count) > tokens)]

    model.head.commit = lambda drawn: count.clear() or commit(drawn)
    model.backbone.lm_head.register_forward_hook(logits)


def reply(model: InterleavedModel, talk: Conversation, way: Options, session=None) -> Message:
    return list(generate(model, talk, way, session))[-1].message


def numbers(image: Image) -> torch.Tensor:
    return torch.tensor(list(image.load().tobytes())).int()


def alike(one: Message, other: Message) -> bool:
    """Whether the texts are equal, and the images within 2 of 255."""
    if one.text != other.text or len(one.images) != len(other.images):
        return False
    pairs = zip(one.images, other.images, strict=True)
    return all((numbers(a) - numbers(b)).abs().max() <= 2 for a, b in pairs)


def check_together(model: InterleavedModel, talks: Sequence[Conversation], way: Options) -> list[Message]:
    """Replies in a batch must be as alone; return them."""
    alone = [reply(model, talk, way) for talk in talks]
    ends = {i: e.message for i, e in generate_batch(model, talks, way) if isinstance(e, Finished)}
    assert all(alike(message, ends[number]) for number, message in enumerate(alone))
    return alone


def train_and_load(model: InterleavedModel, samples: list, settings, folder: Path) -> tuple[list, dict, dict, object]:
    """Train; the same in two pieces and what is loaded must be equal bit for bit.

    Returns the progress, the trained tensors before and after, and the configuration that was loaded.
    """
    save_checkpoint(model, folder / "fresh")
    start = {name: value.clone() for name, value in trained_tensors(model).items()}
    rows = list(train(model, samples, settings, folder / "run"))
    whole = trained_tensors(model)
    for resume in (False, True):
        again = load_checkpoint(resolve(str(folder / "fresh")))
        list(train(again, samples, settings, folder / "parts", stop_after=1, resume=resume))
    loaded = load_checkpoint(resolve(str(folder / "run")))
    for other in (again, loaded):
        torch.testing.assert_close(trained_tensors(other), whole, rtol=0, atol=0)
    return rows, start, whole, loaded.config

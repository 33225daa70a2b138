"""A page with the replies of a model in training to a few fixed samples of its data."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from ..errors import Mgp5Error
from ..events import Finished
from ..inference.reply import generate
from ..messages import Conversation, Message, Text
from ..model import InterleavedModel
from ..options import Options
from ..views.html import write_html

COUNT, STEPS, TOKENS = 4, 12, 64  # samples, denoising steps, tokens of text


def fixed_samples(data: Any, seed: int) -> list[Conversation]:
    """Return the same samples in every call: evenly spaced in the data, or the first of a stream."""
    if hasattr(data, "stream"):
        items = islice(data.stream(rank=0, world=1, batch=1, first=0, seed=seed), COUNT)
    else:
        items = (data[number] for number in range(0, len(data), -(-len(data) // COUNT)))
    samples = (item if isinstance(item, Conversation) else item[1] for item in items)
    return [sample for sample in samples if isinstance(sample, Conversation)]  # a stream also yields `Skipped`


def reply_to(model: InterleavedModel, sample: Conversation) -> Message:
    """Return the model's reply in place of a sample's last message, with an image if that has one. Raises Mgp5Error."""
    *context, target = sample.messages
    options = Options(
        draw="always" if target.images else "never",
        max_tokens=TOKENS if target.text else 0,
        image=model.head.spec.image_options.taking(steps=STEPS),
    )
    *_, last = generate(model, replace(sample, messages=tuple(context)), options)
    assert isinstance(last, Finished)
    return last.message


def sample_page(model: InterleavedModel, samples: list[Conversation], step: int, path: Path | None) -> None:
    """Write a page of samples, each with the model's reply and then that of the data; without a path, only reply.
    The random numbers of the training do not change. A sample that cannot be read or is too long is left out."""
    page = Conversation()
    for sample in samples:
        try:
            for image in sample.images:
                image.load()
            reply = reply_to(model, sample)
        except Mgp5Error:
            continue
        target = Message("user", (Text("In the data:"), *sample.messages[-1].content))
        page = Conversation((*page.messages, *sample.messages[:-1], reply, target))
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_html(page, {"title": f"Step {step}", "options": {"steps": STEPS}}, path, kind="chat")

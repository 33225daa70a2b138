"""Replies -> numbers: the metrics of each kind of question (B pictures, texts or replies)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..errors import Mgp5Error
from ..messages import Message, Text
from . import images, relevance, texts
from .encoded import Encoded
from .measure_storyland import STORYLAND, Measure
from .replies import Number, Replies, mean
from .weights import locate

DRAWN = ("CLIP-I", "CLIP-T", "FID", "IS", "HPS v2")
WORDS = ("S-BERT", "ROUGE-L", "METEOR", "BLEU-1", "BLEU-2")
METRICS_OF: dict[str, tuple[str, ...]] = {  # kind of question -> what is measured, the last of it on Storyland only
    "caption": DRAWN,
    "illustrate": (*DRAWN, "FID per story", "attributes", "Frechet distance, judge"),
    "narrate": (*WORDS, "narrations", "grammar"),
    "continue": (*DRAWN, *WORDS, "coherence", "grammar"),
    "story": ("grammar", "identity"),
    "dialogue": (
        *("IS", "CLIP-I, ViT-B/32", *WORDS, "BLEU-1, characters", "BLEU-2, characters"),
        *("MM-Relevance", "MM-Relevance, pooled", "pictures when due", "attributes", "Frechet distance, judge"),
    ),
}


def _clip_i(name: str, replies: Replies, encoded: Encoded, generator: torch.Generator) -> Number:
    made, real, samples = replies.pictures
    values = images.clip_i(encoded.clip_images(name, made), encoded.clip_images(name, real))
    return mean(values, [sample.group for sample in samples], generator)


def _to_words(
    function: Callable[[Tensor, Tensor], Tensor],
    name: str,
    replies: Replies,
    encoded: Encoded,
    generator: torch.Generator,
) -> Number:
    """CLIP-T and HPS: a picture against what the true one shows in words."""
    made, _, samples = replies.pictures
    values = function(encoded.clip_images(name, made), encoded.clip_texts(name, [sample.words for sample in samples]))
    return mean(values, [sample.group for sample in samples], generator)


def _fid(replies: Replies, encoded: Encoded, generator: torch.Generator) -> Number:
    made, real, _ = replies.pictures
    return Number(images.fid_corpus(encoded.inception(real)[0], encoded.inception(made)[0]), len(made))


def _fid_per_story(replies: Replies, encoded: Encoded, generator: torch.Generator) -> Number:
    made, real, samples = replies.pictures
    stories: dict[str, list[int]] = {}
    for index, sample in enumerate(samples):
        stories.setdefault(sample.group, []).append(index)
    stories = {name: rows for name, rows in stories.items() if len(rows) > 1}
    if not stories:
        raise Mgp5Error("no story with two pictures", "FID per story needs two")
    real_features, made_features = encoded.inception(real)[0], encoded.inception(made)[0]
    values = images.fid_per_story(*([f[rows] for rows in stories.values()] for f in (real_features, made_features)))
    return mean(values, list(stories), generator)


def _inception_score(replies: Replies, encoded: Encoded, generator: torch.Generator) -> Number:
    made = [image for _, _, reply in replies.rows for image in reply.images]  # also those that are not due
    value, deviation = images.inception_score(encoded.inception(made)[1] if made else torch.zeros(0, 1), generator)
    return Number(value, len(made), detail={"deviation over splits": deviation})


def _bleu(order: int, replies: Replies, encoded: Encoded, generator: torch.Generator) -> Number:
    made, real, _ = replies.texts
    return Number(texts.bleu_words(made, real, order), len(made))


def _by_pair(
    function: Callable[..., Tensor], replies: Replies, encoded: Encoded, generator: torch.Generator, **own: Any
) -> Number:
    made, real, groups = replies.texts
    return mean(function(made, real, **own), groups, generator)


def _meteor(replies: Replies, encoded: Encoded, generator: torch.Generator) -> Number:
    return _by_pair(texts.meteor, replies, encoded, generator, wordnet=locate("wordnet", encoded.given))


def _s_bert(replies: Replies, encoded: Encoded, generator: torch.Generator) -> Number:
    made, real, groups = replies.texts
    return mean(texts.s_bert(encoded.sentences(made), encoded.sentences(real)), groups, generator)


def _parts(message: Message, encoded: Encoded) -> list[Tensor]:
    """CLIP's vectors of a reply's parts in order."""
    pictures = iter(encoded.clip_images("clip-b", message.images)) if message.images else iter(())
    words = [part.text for part in message.content if isinstance(part, Text)]
    told = iter(encoded.clip_texts("clip-b", words)) if words else iter(())
    return [next(told) if isinstance(part, Text) else next(pictures) for part in message.content]


def _mm_relevance(replies: Replies, encoded: Encoded, generator: torch.Generator) -> Number:
    found = []
    for _, truth, reply in replies.rows:
        made, real = _parts(reply, encoded), torch.stack(_parts(truth, encoded))
        found.append(relevance.mm_relevance(torch.stack(made) if made else real[:0], real))
    shares = torch.tensor([[row.precision, row.recall, row.f1] for row in found])
    precision, recall, _ = shares.mean(0).tolist()
    groups = [sample.group for sample, _, _ in replies.rows]
    return mean(shares[:, 2], groups, generator, precision=precision, recall=recall)


def _pooled(replies: Replies, encoded: Encoded, generator: torch.Generator) -> Number:
    dialogues: dict[str, tuple[list[dict], list[dict]]] = {}
    for sample, truth, reply in replies.rows:
        for turns, message in zip(dialogues.setdefault(sample.group, ([], [])), (reply, truth), strict=True):
            turn = {"text": encoded.clip_texts("clip-b", [message.text])[0]} if message.text else {}
            images_ = {"image": encoded.clip_images("clip-b", message.images[:1])[0]} if message.images else {}
            turns.append(turn | images_)
    values = [relevance.mm_relevance_pooled(made, real).f1 for made, real in dialogues.values()]
    return mean(torch.tensor(values), list(dialogues), generator)


def _picture_rate(replies: Replies, encoded: Encoded, generator: torch.Generator) -> Number:
    drawn, due = zip(*((bool(r.images), bool(t.images)) for _, t, r in replies.rows), strict=True)
    rates = relevance.picture_rate(drawn, due)
    if rates["due"] is None:
        raise Mgp5Error("no true reply holds a picture", "take more samples")
    rows = [(mine, sample.group) for mine, true, (sample, *_) in zip(drawn, due, replies.rows, strict=True) if true]
    values, groups = zip(*rows, strict=True)
    return mean(torch.tensor(values), groups, generator, **{"not due": rates["not due"]})


MEASURES: dict[str, Measure] = STORYLAND | {
    "CLIP-I": partial(_clip_i, "clip-l"),
    "CLIP-I, ViT-B/32": partial(_clip_i, "clip-b"),
    "CLIP-T": partial(_to_words, images.clip_t, "clip-l"),
    "HPS v2": partial(_to_words, images.hps_v2, "hps"),
    "FID": _fid,
    "FID per story": _fid_per_story,
    "IS": _inception_score,
    "BLEU-1": partial(_bleu, 1),
    "BLEU-2": partial(_bleu, 2),
    "BLEU-1, characters": partial(_by_pair, partial(texts.bleu_characters, order=1)),
    "BLEU-2, characters": partial(_by_pair, partial(texts.bleu_characters, order=2)),
    "ROUGE-L": partial(_by_pair, texts.rouge_l),
    "METEOR": _meteor,
    "S-BERT": _s_bert,
    "MM-Relevance": _mm_relevance,
    "MM-Relevance, pooled": _pooled,
    "pictures when due": _picture_rate,
}


def measure(
    replies: Replies, names: Sequence[str], encoded: Encoded, seed: int
) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Metrics of replies by their names, and why others have none here."""
    found, left_out = {}, {}
    if not replies.rows:
        return {}, dict.fromkeys(names, "there is no reply")
    for name in names:
        try:
            number = MEASURES[name](replies, encoded, torch.Generator().manual_seed(seed))
            found[name] = {key: value for key, value in asdict(number).items() if value not in (None, {})}
        except Mgp5Error as error:
            left_out[name] = str(error)
    return found, left_out

"""All metrics of a report: which function makes each, of what, by whose protocol, and for which kind of question."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..errors import Mgp5Error
from ..messages import Message, Text
from . import metrics
from .encoders import Encoders
from .replies import Metric, Number, Replies, mean
from .storyland import METRICS as STORYLAND
from .weights import locate


def _clip_i(name: str, replies: Replies, encoders: Encoders, generator: torch.Generator) -> Number:
    """CLIP-I: a generated image against the true one (MiniGPT-5, section 4.2.2)."""
    generated, real, samples = replies.images
    values = metrics.cosine_similarity(encoders.clip_images(name, generated), encoders.clip_images(name, real))
    return mean(values, [sample.group for sample in samples], generator)


def _clip_t(name: str, replies: Replies, encoders: Encoders, generator: torch.Generator) -> Number:
    """CLIP-T (MiniGPT-5, table 5; the release's on VIST is of the vokens' string) and HPS v2 (arXiv 2306.09341)."""
    generated, _, samples = replies.images
    texts = encoders.clip_texts(name, [sample.words for sample in samples])
    values = metrics.cosine_similarity(encoders.clip_images(name, generated), texts)
    return mean(values, [sample.group for sample in samples], generator)


def _fid(replies: Replies, encoders: Encoders, generator: torch.Generator) -> Number:
    """FID of all images (MiniGPT-5, table 5); the release resizes the shorter side to 256 first."""
    generated, real, _ = replies.images
    return Number(metrics.fid(encoders.inception(real)[0], encoders.inception(generated)[0]), len(generated))


def _fid_per_story(replies: Replies, encoders: Encoders, generator: torch.Generator) -> Number:
    """The papers' FID of VIST (MiniGPT-5, table 1), of five images: a number only to compare with that table."""
    generated, real, samples = replies.images
    stories: dict[str, list[int]] = {}
    for index, sample in enumerate(samples):
        stories.setdefault(sample.group, []).append(index)
    stories = {name: rows for name, rows in stories.items() if len(rows) > 1}
    if not stories:
        raise Mgp5Error("no story with two pictures", "FID per story needs two")
    true, ours = encoders.inception(real)[0], encoders.inception(generated)[0]
    values = [metrics.frechet_distance(true[rows], ours[rows]) for rows in stories.values()]
    return mean(torch.tensor(values, dtype=torch.float64), list(stories), generator)


def _inception_score(replies: Replies, encoders: Encoders, generator: torch.Generator) -> Number:
    images = [image for _, _, reply in replies.rows for image in reply.images]  # also those that are not due
    logits = encoders.inception(images)[1] if images else torch.zeros(0, 1)
    value, deviation = metrics.inception_score(logits, generator.initial_seed())
    return Number(value, len(images), detail={"deviation over splits": deviation})


def _bleu(order: int, replies: Replies, encoders: Encoders, generator: torch.Generator) -> Number:
    generated, real, _ = replies.texts
    return Number(metrics.bleu_words(generated, real, order), len(generated))


def _text_pairs(
    function: Callable[..., Tensor], replies: Replies, encoders: Encoders, generator: torch.Generator, **options: Any
) -> Number:
    generated, real, _ = replies.texts
    return replies.mean_of_texts(function(generated, real, **options), generator)


def _meteor(replies: Replies, encoders: Encoders, generator: torch.Generator) -> Number:
    return _text_pairs(metrics.meteor, replies, encoders, generator, wordnet=locate("wordnet", encoders.paths))


def _s_bert(replies: Replies, encoders: Encoders, generator: torch.Generator) -> Number:
    """S-BERT (Reimers & Gurevych, 2019; MiniGPT-5, table 2); an empty text has a vector too."""
    generated, real, _ = replies.texts
    values = metrics.cosine_similarity(encoders.sentences(generated), encoders.sentences(real))
    return replies.mean_of_texts(values, generator)


def _part_vectors(message: Message, encoders: Encoders) -> list[Tensor]:
    """Return CLIP's vectors of a reply's parts in order."""
    images = iter(encoders.clip_images("clip-b", message.images)) if message.images else iter(())
    words = [part.text for part in message.content if isinstance(part, Text)]
    texts = iter(encoders.clip_texts("clip-b", words)) if words else iter(())
    return [next(texts) if isinstance(part, Text) else next(images) for part in message.content]


def _mm_relevance(replies: Replies, encoders: Encoders, generator: torch.Generator) -> Number:
    scores = []
    for _, truth, reply in replies.rows:
        generated, real = _part_vectors(reply, encoders), torch.stack(_part_vectors(truth, encoders))
        scores.append(metrics.mm_relevance(torch.stack(generated) if generated else real[:0], real))
    shares = torch.tensor(scores)  # (B, 3)
    precision, recall, _ = shares.mean(0).tolist()
    return mean(shares[:, 2], replies.groups, generator, precision=precision, recall=recall)


def _pooled(replies: Replies, encoders: Encoders, generator: torch.Generator) -> Number:
    dialogues: dict[str, tuple[list[dict], list[dict]]] = {}
    for sample, truth, reply in replies.rows:
        for turns, message in zip(dialogues.setdefault(sample.group, ([], [])), (reply, truth), strict=True):
            turn = {"text": encoders.clip_texts("clip-b", [message.text])[0]} if message.text else {}
            image = {"image": encoders.clip_images("clip-b", message.images[:1])[0]} if message.images else {}
            turns.append(turn | image)
    values = [metrics.mm_relevance_pooled(generated, real).f1 for generated, real in dialogues.values()]
    return mean(torch.tensor(values), list(dialogues), generator)


def _image_rate(replies: Replies, encoders: Encoders, generator: torch.Generator) -> Number:
    """Shares of replies that hold an image, where the true one does, and where it does not."""
    rows = [(bool(reply.images), bool(truth.images), sample.group) for sample, truth, reply in replies.rows]
    due, not_due = ([(drawn, group) for drawn, wanted, group in rows if wanted == kind] for kind in (True, False))
    if not due:
        raise Mgp5Error("no true reply holds a picture", "take more samples")
    values, groups = zip(*due, strict=True)
    rate = sum(drawn for drawn, _ in not_due) / len(not_due) if not_due else None
    return mean(torch.tensor(values), groups, generator, **{"not due": rate})


_DIALOGUES = "rows (dialogues, the mean of their turns) in [0, 1]"
_COSINE, _INCEPTION = "rows, cosine in [-1, 1]", ("torchmetrics", "torch_fidelity", "inception")
_CHARACTERS = [partial(_text_pairs, partial(metrics.bleu_characters, order=order)) for order in (1, 2)]
METRICS: dict[str, Metric] = {
    # Images
    "CLIP-I": Metric(partial(_clip_i, "clip-l"), ("clip-l",), _COSINE, "MiniGPT-5, CC3M and VIST"),
    "CLIP-I, ViT-B/32": Metric(partial(_clip_i, "clip-b"), ("clip-b",), _COSINE, "the release, MMDialog"),
    "CLIP-T": Metric(partial(_clip_t, "clip-l"), ("clip-l",), _COSINE, "MiniGPT-5, CC3M"),
    "FID": Metric(_fid, _INCEPTION, "number, >= 0", "Heusel et al.; MiniGPT-5, CC3M", "lower"),
    "FID per story": Metric(_fid_per_story, _INCEPTION, "rows (stories), >= 0", "MiniGPT-5, VIST", "lower"),
    "IS": Metric(_inception_score, _INCEPTION, "number, 1 to 1008", "Salimans et al.; MiniGPT-5"),
    "HPS v2": Metric(partial(_clip_t, "hps"), ("hps", "clip-b"), _COSINE, "Wu et al.; MiniGPT-5 of 2023"),
    # Texts
    "BLEU-1": Metric(partial(_bleu, 1), ("torchmetrics",), "number in [0, 1]", "Papineni et al.; MMDialog"),
    "BLEU-2": Metric(partial(_bleu, 2), ("torchmetrics",), "number in [0, 1]", "Papineni et al.; MMDialog"),
    "BLEU-1, characters": Metric(_CHARACTERS[0], ("nltk",), _DIALOGUES, "the release, MMDialog"),
    "BLEU-2, characters": Metric(_CHARACTERS[1], ("nltk",), _DIALOGUES, "the release, MMDialog"),
    "ROUGE-L": Metric(
        partial(_text_pairs, metrics.rouge_l), ("torchmetrics",), "rows in [0, 1]", "Lin; MiniGPT-5, VIST and MMDialog"
    ),
    "METEOR": Metric(_meteor, ("nltk", "wordnet"), "rows in [0, 1]", "Banerjee & Lavie; MiniGPT-5, VIST"),
    "S-BERT": Metric(_s_bert, ("minilm",), _COSINE, "Reimers & Gurevych; MiniGPT-5, VIST"),
    # Replies of text and images
    "MM-Relevance": Metric(_mm_relevance, ("clip-b",), "rows (replies)", "MMDialog"),
    "MM-Relevance, pooled": Metric(_pooled, ("clip-b",), "rows (dialogues)", "the release"),
    "pictures when due": Metric(_image_rate, (), "number in [0, 1]", "ours"),
    **STORYLAND,
}
_IMAGES = ("CLIP-I", "CLIP-T", "FID", "IS", "HPS v2")
_TEXTS = ("S-BERT", "ROUGE-L", "METEOR", "BLEU-1", "BLEU-2")
METRICS_OF: dict[str, tuple[str, ...]] = {  # kind of question -> what is measured, the last of it on Storyland only
    "caption": (*_IMAGES, "attributes", "Frechet distance, judge"),
    "illustrate": (*_IMAGES, "FID per story", "attributes", "Frechet distance, judge"),
    "narrate": (*_TEXTS, "narrations", "grammar"),
    "continue": (*_IMAGES, *_TEXTS, "coherence", "grammar"),
    "story": ("grammar", "identity"),
    "details": ("details", "attributes", "Frechet distance, judge"),
    "dialogue": (
        *("IS", "CLIP-I, ViT-B/32", *_TEXTS, "BLEU-1, characters", "BLEU-2, characters"),
        *("MM-Relevance", "MM-Relevance, pooled", "pictures when due", "attributes", "Frechet distance, judge"),
    ),
}


def measure(
    replies: Replies, names: Sequence[str], encoders: Encoders, seed: int
) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Return metrics of replies by their names, and why others have no number here."""
    if not replies.rows:
        return {}, dict.fromkeys(names, "there is no reply")
    numbers, left_out = {}, {}
    for name in names:
        try:
            number = METRICS[name].measure(replies, encoders, torch.Generator().manual_seed(seed))
            numbers[name] = {key: value for key, value in asdict(number).items() if value not in (None, {})}
        except Mgp5Error as error:
            left_out[name] = str(error)
    return numbers, left_out

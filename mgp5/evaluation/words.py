"""What the words of a report mean, for people who have not read the papers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

TASKS = {
    "first": "the first sentence of a story is drawn",
    "illustrate": "a sentence of a story is drawn",
    "narrate": "a picture of a story is told",
    "continue": "the next scene of a story is told and drawn",
    "last": "the last sentence of a story is drawn",
    "story": "all scenes after the first are told and drawn, each on top of the model's own before it",
    "caption": "a caption is drawn",
    "dialogue": "a message is answered, with a picture or without",
    "subject": "those of a dialogue that ask for another character than the last picture shows",
    "details": "a sentence is drawn behind a picture with a kite, of which no sentence tells",
}
CONTEXTS = {
    "full": "with the sentences and pictures before it",
    "text": "with the sentences before it",
    "image": "with the pictures before it",
    "none": "without what came before",
}
SYSTEMS = {
    "model": "the model that is evaluated",
    "t2i": "its image generator alone, which reads the sentences",
    "t2i-tuned": "an image generator that was trained on such pictures, which reads the sentences",
    "two-stage": "a language model writes a sentence, and the image generator draws it",
    "gill": "a model that was trained by the objective of GILL (Koh et al., 2023)",
    "text-only": "the language model as it was before it was trained here, without pictures of its own",
    "oracle": "the image generator, told all that the true picture shows: an upper bound",
    "VAE": "the true picture, encoded and decoded again: nothing that the generator draws can be nearer",
    "VAE-anew": "the same, of another drawing of the same scene",
}
METRICS = {
    "CLIP-I": "how alike CLIP finds the picture and the true one",
    "CLIP-I, ViT-B/32": "the same, by a smaller CLIP",
    "CLIP-T": "how well CLIP finds that the picture fits the sentence",
    "FID": "distance of all pictures from all true ones, as a network for photos sees them",
    "FID per story": "FID of the pictures of one story, averaged: only to compare with the papers",
    "IS": "Inception Score: how distinct and varied a network for photos finds the pictures",
    "HPS v2": "how much people would like the picture for its sentence, as a network guesses",
    "BLEU-1": "share of words that the true texts have too",
    "BLEU-2": "share of pairs of words that the true texts have too",
    "BLEU-1, characters": "share of letters that the true text has too: only to compare with the papers",
    "BLEU-2, characters": "share of pairs of letters that the true text has too: only to compare with the papers",
    "ROUGE-L": "how long a row of words the text and the true one share",
    "METEOR": "how many words they share, synonyms counted",
    "S-BERT": "how alike in meaning a network finds the text and the true one",
    "MM-Relevance": "how alike texts and pictures of a reply are to those of the true one, in order",
    "MM-Relevance, pooled": "the same over a whole dialogue, as the papers' code computes it",
    "pictures when due": "share of replies with a picture, where the true reply has one",
    "attributes": "share of what was asked for (who, where, weather, ...) that the judge reads in the picture",
    "details": "share of the kite's colour, pattern, size and corner that the picture keeps",
    "Frechet distance, judge": "distance of all pictures from all true ones, as the judge sees them",
    "coherence": "share of what the judge reads that fits the text and the story before it",
    "narrations": "share of texts that tell exactly what has changed",
    "grammar": "share of stories whose every sentence the grammar of Storyland knows",
    "identity": "share of stories whose character stays the same in all pictures",
}
SIGNS = {
    "n": "how many replies, dialogues or stories a number is the mean of",
    "small numbers": "95 % interval: where the mean would lie with other samples of this kind",
    "arrow": "whether more or less is better",
    "theirs": "a number that a paper printed; it was not measured here",
    "no picture, no text": "replies that lack what the true reply has",
}


def words(report: dict[str, Any]) -> dict[str, str]:
    """Return what a report's tables, systems, metrics and signs mean, in the order in which they come."""
    tables, systems = report["tables"], list(report["tables"].values())
    titles = {table: ", ".join(_meaning(table)) for table in tables if table.partition(", ")[0] in TASKS}
    names = dict.fromkeys(name for system in systems for name in system)
    metrics = dict.fromkeys(name for s in systems for entry in s.values() for name in entry["metrics"])
    return titles | _known(SYSTEMS, names) | _known(METRICS, metrics) | SIGNS


def _meaning(table: str) -> Iterator[str]:
    task, _, context = table.partition(", ")
    yield TASKS[task]
    if context:
        yield CONTEXTS[context]


def _known(meanings: dict[str, str], names: Iterable[str]) -> dict[str, str]:
    return {name: meanings[name] for name in names if name in meanings}

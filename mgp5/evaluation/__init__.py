"""How interleaved generation is measured: the papers' metrics, each a pure function, and Storyland's own.

`METRICS` says for every name in a report which function makes it, of what, and whose protocol it is; the function's
docstring has paper, section, and what the release did instead. Networks of `encoders` turn pictures and texts into the
vectors that functions take; `weights.left_out` says why a metric has to be left out. Rows (one number per sample) go
through `intervals.mean_interval`; a generated picture that is missing has no row, and the report counts it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Metric:
    """One number of a report.

    Attributes:
        function: module of this package, and the name in it.
        needs: weights of `weights.WEIGHTS` and packages (of the extras eval and fid).
        unit: range, and what the function gives: a "row" per sample, or one "number" of the whole set.
        better: which way is better.
        protocol: whose it is; "the release" is MiniGPT-5's code.
    """

    function: str
    needs: tuple[str, ...]
    unit: str
    better: Literal["higher", "lower"]
    protocol: str


def _metric(
    function: str, needs: str, unit: str, protocol: str, better: Literal["higher", "lower"] = "higher"
) -> Metric:
    return Metric(function, tuple(needs.split()), unit, better, protocol)


COSINE, SHARE = "rows, cosine in [-1, 1]", "rows, true or false"
INCEPTION = "torchmetrics torch_fidelity inception"
METRICS: dict[str, Metric] = {
    # Pictures
    "CLIP-I": _metric("images.clip_i", "clip-l", COSINE, "MiniGPT-5, CC3M and VIST"),
    "CLIP-I, ViT-B/32": _metric("images.clip_i", "clip-b", COSINE, "the release, MMDialog"),
    "CLIP-T": _metric("images.clip_t", "clip-l", COSINE, "MiniGPT-5, CC3M"),
    "FID": _metric("images.fid_corpus", INCEPTION, "number, >= 0", "Heusel et al.; MiniGPT-5, CC3M", "lower"),
    "FID per story": _metric("images.fid_per_story", INCEPTION, "rows (stories), >= 0", "MiniGPT-5, VIST", "lower"),
    "IS": _metric("images.inception_score", INCEPTION, "number, 1 to 1008", "Salimans et al.; MiniGPT-5"),
    "HPS v2": _metric("images.hps_v2", "hps clip-b", COSINE, "Wu et al.; MiniGPT-5 of 2023"),
    # Texts
    "BLEU-1": _metric("texts.bleu_words", "torchmetrics", "number in [0, 1]", "Papineni et al.; MMDialog"),
    "BLEU-2": _metric("texts.bleu_words", "torchmetrics", "number in [0, 1]", "Papineni et al.; MMDialog"),
    "BLEU-1, characters": _metric("texts.bleu_characters", "nltk", "rows in [0, 1]", "the release, MMDialog"),
    "BLEU-2, characters": _metric("texts.bleu_characters", "nltk", "rows in [0, 1]", "the release, MMDialog"),
    "ROUGE-L": _metric("texts.rouge_l", "torchmetrics", "rows in [0, 1]", "Lin; MiniGPT-5, VIST and MMDialog"),
    "METEOR": _metric("texts.meteor", "nltk wordnet", "rows in [0, 1]", "Banerjee & Lavie; MiniGPT-5, VIST"),
    "S-BERT": _metric("texts.s_bert", "minilm", COSINE, "Reimers & Gurevych; MiniGPT-5, VIST"),
    # Replies of text and pictures
    "MM-Relevance": _metric("relevance.mm_relevance", "clip-b", "rows (replies)", "MMDialog"),
    "MM-Relevance, pooled": _metric("relevance.mm_relevance_pooled", "clip-b", "rows (dialogues)", "the release"),
    "pictures when due": _metric("relevance.picture_rate", "", "number in [0, 1]", "ours"),
    # Storyland
    "attributes": _metric("storyland.attributes_right", "", SHARE, "ours, Storyland"),
    "Frechet distance, judge": _metric("images.frechet_distance", "", "number, >= 0", "ours, Storyland", "lower"),
    "coherence": _metric("storyland.coherence", "", SHARE, "ours, Storyland"),
    "narrations": _metric("storyland.narration_right", "", SHARE, "ours, Storyland"),
    "grammar": _metric("storyland.grammatical", "", SHARE, "ours, Storyland"),
    "identity": _metric("storyland.identity_kept", "", SHARE, "ours, Storyland"),
}  # fmt: skip

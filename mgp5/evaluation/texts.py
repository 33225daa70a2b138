"""Metrics of texts: predictions against one reference each, numbers in [0, 1] (B pairs, E embedding).

A missing prediction is "", which scores 0 and lengthens BLEU's brevity penalty. Libraries come with `mgp5[eval]`.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from .images import cosines


def bleu_words(predictions: Sequence[str], references: Sequence[str], order: int) -> float:
    """BLEU of the corpus on words (Papineni et al., 2002), n-grams up to `order`; sacrebleu's 13a words, no smoothing.

    MiniGPT-5's table on MMDialog has orders 1 and 2; its numbers are of characters, see `bleu_characters`.
    """
    from torchmetrics.functional.text import sacre_bleu_score

    return float(sacre_bleu_score(list(predictions), [[text] for text in references], n_gram=order))


def bleu_characters(predictions: Sequence[str], references: Sequence[str], order: int) -> Tensor:
    """BLEU (B,) per pair on *characters*, only to compare with MiniGPT-5's table: the release gives nltk plain strings.

    Unrelated English sentences score about 0.6 (order 1) and 0.4 (order 2).
    """
    from nltk.translate.bleu_score import sentence_bleu

    pairs = zip(predictions, references, strict=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that without a common n-gram the score is 0
        return torch.tensor([sentence_bleu([real], made, [1 / order] * order) for made, real in pairs])


def rouge_l(predictions: Sequence[str], references: Sequence[str]) -> Tensor:
    """ROUGE-L F1 (B,) of the longest common subsequence of lower-case words (Lin, 2004, section 3.1), without stemming.

    The release's package `rouge` cuts at periods and blanks, keeps punctuation, and counts a repeated word once.
    """
    from torchmetrics.functional.text import rouge_score

    scores = (rouge_score(*pair, rouge_keys="rougeL") for pair in zip(predictions, references, strict=True))
    return torch.tensor([float(score["rougeL_fmeasure"]) for score in scores])


def meteor(predictions: Sequence[str], references: Sequence[str], wordnet: Path) -> Tensor:
    """METEOR (B,) (Banerjee & Lavie, 2005): exact, stemmed and WordNet matches, nltk's defaults (0.9, 3, 0.5).

    Words as nltk's tokenizer splits a sentence. The papers report it for VIST's narrations, the release cannot.

    Args:
        predictions: B texts.
        references: B texts.
        wordnet: nltk's data folder, with corpora/wordnet.zip (or the folder wordnet) in it; read once per process.
    """
    import nltk
    from nltk.tokenize import NLTKWordTokenizer
    from nltk.translate.meteor_score import single_meteor_score

    if str(wordnet) not in nltk.data.path:
        nltk.data.path.insert(0, str(wordnet))
    split = NLTKWordTokenizer().tokenize
    pairs = zip(predictions, references, strict=True)
    return torch.tensor([single_meteor_score(split(real), split(made)) for made, real in pairs])


def s_bert(predictions: Tensor, references: Tensor) -> Tensor:
    """S-BERT (B,) in [-1, 1]: cosine of unit sentence vectors (B, E) of all-MiniLM-L6-v2 (Reimers & Gurevych, 2019).

    As the release; of MiniGPT-5's table 2. An empty prediction has a vector too: count those apart.
    """
    return cosines(predictions, references)

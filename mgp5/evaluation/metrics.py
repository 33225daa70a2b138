"""Metrics of replies as functions of features and texts (B images or pairs, E embedding, F features, C classes).

FID, Inception Score, BLEU and ROUGE are torchmetrics'; METEOR is nltk's. What stands here in full is what the papers
define otherwise. A generated image that is missing has no row; a missing text is "", which scores 0.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..errors import Mgp5Error, counted


def cosine_similarity(a: Tensor, b: Tensor) -> Tensor:  # (B, E), (B, E) -> (B,)
    """Return the cosine of each pair of unit vectors, in [-1, 1]: CLIP-I, CLIP-T, S-BERT, HPS v2, by the encoder."""
    return (a * b).sum(-1)


def fid(real: Tensor, generated: Tensor) -> float:  # (N, F), (M, F)
    """Return the Frechet Inception Distance (Heusel et al., arXiv 1706.08500) of Inception's last pooled features."""
    from torchmetrics.image.fid import FrechetInceptionDistance

    _require_two(real, generated)
    network = nn.Identity()  # features are given where the metric expects a network on images
    network.num_features = real.shape[1]
    metric = FrechetInceptionDistance(network, normalize=True)
    metric.update(real.double(), real=True)
    metric.update(generated.double(), real=False)
    return float(metric.compute())


def frechet_distance(a: Tensor, b: Tensor) -> float:  # (N, F), (M, F)
    """Return the Frechet distance of the Gaussians fitted to features: `fid`, but fast for a few rows. With covariances
    A^T A and B^T B, the trace of the root of their product is the sum of the singular values of A B^T."""
    _require_two(a, b)
    (mean_a, root_a), (mean_b, root_b) = _gaussian(a.double()), _gaussian(b.double())
    cross = torch.linalg.svdvals(root_a @ root_b.T).sum()
    spread = root_a.square().sum() + root_b.square().sum() - 2 * cross
    return float((mean_a - mean_b).square().sum() + spread.clamp(min=0))


def _require_two(*sets: Tensor) -> None:
    if (fewest := min(map(len, sets))) < 2:
        raise Mgp5Error(counted(fewest, "image"), "a Frechet distance needs two or more on each side")


def _gaussian(features: Tensor) -> tuple[Tensor, Tensor]:  # (N, F) -> (F,), (min(N, F), F)
    """Return the mean, and a matrix R with R^T R the unbiased covariance."""
    mean = features.mean(0)
    return mean, torch.linalg.qr((features - mean) / (len(features) - 1) ** 0.5, mode="r").R


def inception_score(logits: Tensor, seed: int, splits: int = 10) -> tuple[float, float]:  # (B, C) without bias
    """Return mean and deviation over splits of the Inception Score, in [1, C] (Salimans et al., arXiv 1606.03498).
    `seed` shuffles the rows before they are split. A split cannot score above its number of images."""
    from torchmetrics.image.inception import InceptionScore

    if len(logits) < splits:
        raise Mgp5Error(counted(len(logits), "image"), f"an Inception Score of {splits} splits needs {splits} or more")
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")  # that features stay in memory
        torch.manual_seed(seed)
        metric = InceptionScore(nn.Identity(), splits=splits)
        metric.update(logits.double())
        mean, deviation = metric.compute()
    return float(mean), float(deviation)


def bleu_words(predictions: Sequence[str], references: Sequence[str], order: int) -> float:
    """Return BLEU of the corpus in [0, 1] on sacrebleu's 13a words, unsmoothed (Papineni et al., 2002)."""
    from torchmetrics.functional.text import sacre_bleu_score

    return float(sacre_bleu_score(list(predictions), [[text] for text in references], n_gram=order))


def bleu_characters(predictions: Sequence[str], references: Sequence[str], order: int) -> Tensor:  # (B,)
    """Return BLEU of each pair on *characters*: the release gives nltk strings where it expects lists of words. Only to
    compare with MiniGPT-5's table 4: unrelated English sentences score about 0.6 (order 1) and 0.4 (order 2)."""
    from nltk.translate.bleu_score import sentence_bleu

    pairs = zip(predictions, references, strict=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that without a common n-gram the score is 0
        return torch.tensor([sentence_bleu([real], made, [1 / order] * order) for made, real in pairs])


def rouge_l(predictions: Sequence[str], references: Sequence[str]) -> Tensor:  # (B,)
    """Return F1 of the longest common subsequence of lower-case words, without stemming (Lin, 2004, section 3.1).
    The release's package `rouge` cuts at periods and blanks, keeps punctuation, and counts a repeated word once."""
    from torchmetrics.functional.text import rouge_score

    scores = (rouge_score(*pair, rouge_keys="rougeL") for pair in zip(predictions, references, strict=True))
    return torch.tensor([float(score["rougeL_fmeasure"]) for score in scores])


def meteor(predictions: Sequence[str], references: Sequence[str], wordnet: Path) -> Tensor:  # (B,)
    """Return METEOR in [0, 1] with nltk's defaults (Banerjee & Lavie, 2005); `wordnet` is nltk's data folder."""
    import nltk
    from nltk.tokenize import NLTKWordTokenizer
    from nltk.translate.meteor_score import single_meteor_score

    if str(wordnet) not in nltk.data.path:
        nltk.data.path.insert(0, str(wordnet))
    split = NLTKWordTokenizer().tokenize
    pairs = zip(predictions, references, strict=True)
    return torch.tensor([single_meteor_score(split(real), split(made)) for made, real in pairs])


class Relevance(NamedTuple):
    """Precision, recall and F1 of MM-Relevance, each in [-1, 1]; precision is 0 for an empty reply."""

    precision: float
    recall: float
    f1: float


def mm_relevance(generated: Tensor, real: Tensor) -> Relevance:  # (M, E), (N, E) unit vectors of parts in order
    """Return MM-Relevance of one reply against the true one, as MMDialog defines it (Feng et al., 2022).

    Parts are aligned from the left, whatever their kind, up to the shorter reply. With S the sum of the cosines of
    aligned parts, precision is S / M, recall S / N, F1 2S / (M + N). MMDialog's tables show the mean of F1 times 100.
    """
    aligned = min(len(generated), len(real))
    return _relevance(float((generated[:aligned] * real[:aligned]).sum()), len(generated), len(real))


def mm_relevance_pooled(generated: Sequence[dict[str, Tensor]], real: Sequence[dict[str, Tensor]]) -> Relevance:
    """Return the MM-Relevance of one dialogue as MiniGPT-5's release computes it: only to compare with its table 4.

    A turn has unit vectors (E,) of "text" and "image", one of each at most; each is compared with its own kind. What is
    missing counts in recall, what is too much in precision, over all turns.
    """
    pairs = [(a[kind], b[kind]) for a, b in zip(generated, real, strict=True) for kind in a.keys() & b]
    return _relevance(sum(float(a @ b) for a, b in pairs), sum(map(len, generated)), sum(map(len, real)))


def _relevance(total: float, generated: int, real: int) -> Relevance:
    return Relevance(total / generated if generated else 0.0, total / real, 2 * total / (generated + real))


def group_means(values: Tensor, groups: Sequence[str]) -> tuple[Tensor, list[str]]:  # (B,) -> (G,)
    """Return the mean of the values of each group, and the groups in order."""
    rows: dict[str, list[float]] = {}
    for value, group in zip(values.tolist(), groups, strict=True):
        rows.setdefault(group, []).append(value)
    return torch.tensor([sum(row) / len(row) for row in rows.values()], dtype=torch.float64), list(rows)


def mean_interval(
    values: Tensor, groups: Sequence[object], generator: torch.Generator, draws: int = 2000
) -> tuple[float, float, float]:
    """Return the mean of values (B,), and the ends of its 95 % interval by the percentile bootstrap (Efron, 1979).
    Whole groups (the story or dialogue of each value, G of them) are drawn: samples of a group are not independent."""
    names = {name: number for number, name in enumerate(dict.fromkeys(groups))}
    index = torch.tensor([names[name] for name in groups])
    sums = torch.zeros(len(names), 2, dtype=torch.float64)  # (G, 2): sum and count
    sums.index_add_(0, index, torch.stack([values.double(), torch.ones(len(values)).double()], dim=1))
    picked = torch.randint(len(names), (draws, len(names)), generator=generator)
    totals, counts = sums[picked].sum(1).unbind(1)
    low, high = torch.quantile(totals / counts, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return float(values.double().mean()), low, high

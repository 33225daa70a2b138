"""Metrics of pictures, on features (B pictures or pairs, E embedding, F features, C classes, S stories, T steps).

Similarities take unit vectors (B, E) of `encoders` and give one number per row, for means and intervals. A reply
without a picture has no row: it is counted, never replaced.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import Mgp5Error


def cosines(a: Tensor, b: Tensor) -> Tensor:  # (B, E), (B, E) -> (B,)
    """Cosine of each pair of unit vectors."""
    if a.shape != b.shape:
        raise ValueError(f"expected as many rows on both sides, got {tuple(a.shape)} and {tuple(b.shape)}")
    return (a * b).sum(-1)


def clip_i(made: Tensor, real: Tensor) -> Tensor:
    """CLIP-I (B,) in [-1, 1]: cosine of a generated picture and the true one (MiniGPT-5, section 4.2.2).

    OpenAI's ViT-L/14 for CC3M and VIST, ViT-B/32 for MMDialog, as in the release, which also leaves out samples
    without a picture.
    """
    return cosines(made, real)


def clip_t(made: Tensor, texts: Tensor) -> Tensor:
    """CLIP-T (B,) in [-1, 1]: cosine of a generated picture and the true text, cut at 77 tokens (MiniGPT-5, table 5).

    CC3M: the caption. VIST: the narration of the step; the release compares with the string of vokens there, so the
    papers have no number of it.
    """
    return cosines(made, texts)


def hps_v2(made: Tensor, prompts: Tensor) -> Tensor:
    """Human Preference Score v2 (B,) (Wu et al., arXiv 2306.09341): the cosine of its CLIP ViT-H/14.

    Its tables show it times 100. Pictures are padded to a square, see `encoders.Clip`.
    """
    return cosines(made, prompts)


def share_of_best(scores: Tensor) -> Tensor:
    """Share of prompts (M,) for which each of M models has the highest score (M, B) (MiniGPT-5 of 2023, figure 3).

    The figure shows counts. A tie is shared equally.
    """
    best = (scores == scores.amax(0)).double()
    return (best / best.sum(0)).mean(1)


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Frechet distance of Gaussians fitted to features (N, F) and (M, F) (Heusel et al., arXiv 1706.08500, eq. 6).

    With centred features A and B, each over the root of its rows - 1, the trace of the root of the product of both
    covariances is the sum of the singular values of A B^T: real, and fast for a handful of rows.

    Raises:
        Mgp5Error: a set has fewer than two rows.
    """
    if min(len(a), len(b)) < 2:
        raise Mgp5Error(f"{min(len(a), len(b))} pictures", "a Frechet distance needs two or more on each side")
    (mean_a, root_a), (mean_b, root_b) = _gaussian(a.double()), _gaussian(b.double())
    cross = torch.linalg.svdvals(root_a @ root_b.T).sum()
    spread = root_a.square().sum() + root_b.square().sum() - 2 * cross
    return float((mean_a - mean_b).square().sum() + spread.clamp(min=0))


def _gaussian(features: Tensor) -> tuple[Tensor, Tensor]:  # (N, F) -> (F,), (min(N, F), F)
    """Mean, and a matrix R with R^T R the unbiased covariance."""
    mean = features.mean(0)
    root = (features - mean) / (len(features) - 1) ** 0.5
    return mean, torch.linalg.qr(root, mode="r").R if len(root) > root.shape[1] else root


def fid_corpus(real: Tensor, made: Tensor) -> float:
    """FID of two sets of pictures from Inception's features (N, 2048), (M, 2048) (Heusel et al.; MiniGPT-5, table 5).

    Say with it how many pictures there were and `antialias` of `encoders.Inception`. The release makes the shorter side
    256 first, and leaves failures out.
    """
    return frechet_distance(real, made)


def fid_per_story(real: Sequence[Tensor], made: Sequence[Tensor]) -> Tensor:
    """The papers' FID of VIST (S,): of each story its true against its generated pictures, (T, 2048) both.

    MiniGPT-5, table 1 (366.62) is the mean. Gaussians of five pictures: a number only to compare with that table. A
    story needs two pictures on both sides.
    """
    pairs = zip(real, made, strict=True)
    return torch.tensor([frechet_distance(*pair) for pair in pairs], dtype=torch.float64)


def inception_score(logits: Tensor, generator: torch.Generator, splits: int = 10) -> tuple[float, float]:
    """Inception Score in [1, C], mean and standard deviation over splits (Salimans et al., arXiv 1606.03498).

    Args:
        logits: (B, C) without the last layer's bias, as torch-fidelity and torchmetrics have them.
        generator: shuffles the rows before they are split.
        splits: the usual 10, which the release has too; a few pictures score low, for a split cannot score above its
            number of pictures.

    Raises:
        Mgp5Error: fewer pictures than splits.
    """
    if len(logits) < splits:
        raise Mgp5Error(f"{len(logits)} pictures", f"an Inception Score of {splits} splits needs {splits} or more")
    shuffled = logits.double()[torch.randperm(len(logits), generator=generator)].log_softmax(1)
    values = []
    for logp in shuffled.tensor_split(splits):
        log_mean = logp.logsumexp(0) - torch.tensor(len(logp)).log()
        values.append((logp.exp() * (logp - log_mean)).sum(1).mean().exp())
    found = torch.stack(values)
    return float(found.mean()), float(found.std(correction=0))

"""Confidence intervals of means over samples that come in groups (B samples, G groups)."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import NormalDist

import torch
from torch import Tensor


def mean_interval(
    values: Tensor, groups: Sequence[object], generator: torch.Generator, draws: int = 2000
) -> tuple[float, float, float]:
    """Mean, and the ends of its 95 % interval by the percentile bootstrap over whole groups (Efron, 1979).

    Args:
        values: (B,) numbers or booleans.
        groups: of each sample its story or dialogue: the steps of one are no independent samples.
        generator: draws groups with replacement.
        draws: number of resamples.
    """
    names = {name: number for number, name in enumerate(dict.fromkeys(groups))}
    index = torch.tensor([names[name] for name in groups])
    sums = torch.zeros(len(names), 2, dtype=torch.float64)  # (G, 2): sum and count
    sums.index_add_(0, index, torch.stack([values.double(), torch.ones(len(values)).double()], dim=1))
    picked = torch.randint(len(names), (draws, len(names)), generator=generator)
    totals, counts = sums[picked].sum(1).unbind(1)
    low, high = torch.quantile(totals / counts, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return float(values.double().mean()), low, high


def share_interval(hits: Sequence[bool], groups: Sequence[object]) -> tuple[float, float, float]:
    """Share of hits, and the ends of Wilson's 95 % interval (1927), which holds for few samples and rare hits too.

    It counts as many samples as would be known as well if they were independent, as survey statistics does (Kish,
    1965): a group whose samples say the same is one. At shares of 0 and 1 every group counts as one.

    Args:
        hits: (B,) of them.
        groups: of each sample, as for `mean_interval`.
    """
    count, share = len(hits), sum(hits) / len(hits)
    sums = dict.fromkeys(groups, 0.0)
    for hit, group in zip(hits, groups, strict=True):
        sums[group] += hit - share
    spread = max(sum(value**2 for value in sums.values()), 1e-12)
    size = min(count, count**2 * share * (1 - share) / spread) or len(sums)
    z = NormalDist().inv_cdf(0.975)
    middle, width = share + z**2 / (2 * size), z * (share * (1 - share) / size + z**2 / (4 * size**2)) ** 0.5
    return share, (middle - width) / (1 + z**2 / size), (middle + width) / (1 + z**2 / size)

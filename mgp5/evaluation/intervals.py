"""Confidence intervals of means over samples that come in groups (B samples, G groups)."""

from __future__ import annotations

from collections.abc import Sequence

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

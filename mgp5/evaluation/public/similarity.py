"""CoMM's metrics that `metrics` lacks: CIDEr-D of texts; SSIM and PSNR of images, as functions of pairs."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from ...messages import Image

SIDE = 256  # pixels that CoMM compares images at, squeezed to a square
WINDOW = 7  # of SSIM, uniform
SIGMA = 6  # of CIDEr-D's penalty for another length, in words
ORDERS = 4  # of CIDEr-D's n-grams
BEST_PSNR = 100.0  # dB of equal images, whose PSNR has no bound


def cider(predictions: Sequence[str], references: Sequence[str]) -> Tensor:  # (B,)
    """Return CIDEr-D of each pair, in [0, 10] (Vedantam et al., CVPR 2015, section 5), lower-case words unstemmed.
    An n-gram weighs by how few of the references hold it, so that a corpus of one pair has no number but 0."""
    texts = [[_ngrams(text) for text in side] for side in (predictions, references)]
    documents = Counter(gram for grams in texts[1] for gram in grams)
    size = math.log(max(1, len(references)))
    scores = []
    for made, real in zip(*texts, strict=True):
        # Order 1 counts words: the penalty for repeating words to a length that the other has not.
        penalty = math.exp(-((_words(made) - _words(real)) ** 2) / (2 * SIGMA**2))
        weighted = [{g: n * (size - math.log(max(1, documents[g]))) for g, n in t.items()} for t in (made, real)]
        scores.append(10 * penalty * sum(_clipped_cosine(*weighted, order) for order in range(1, ORDERS + 1)) / ORDERS)
    return torch.tensor(scores, dtype=torch.float64)


def _ngrams(text: str) -> Counter[tuple[str, ...]]:
    words = re.findall(r"\w+", text.lower())
    return Counter(tuple(words[i : i + n]) for n in range(1, ORDERS + 1) for i in range(len(words) - n + 1))


def _words(grams: Counter[tuple[str, ...]]) -> int:
    return sum(count for gram, count in grams.items() if len(gram) == 1)


def _clipped_cosine(made: dict[tuple[str, ...], float], real: dict[tuple[str, ...], float], order: int) -> float:
    made, real = ({gram: value for gram, value in side.items() if len(gram) == order} for side in (made, real))
    shared = sum(min(value, real[gram]) * real[gram] for gram, value in made.items() if gram in real)
    norms = [math.sqrt(sum(value**2 for value in side.values())) for side in (made, real)]
    return shared / (norms[0] * norms[1]) if all(norms) else 0.0


def squares(images: Sequence[Image]) -> Tensor:  # (N, 3, SIDE, SIDE) in [0, 255], float64
    """Return the pixels of images, squeezed to squares."""
    if not images:
        return torch.zeros(0, 3, SIDE, SIDE, dtype=torch.float64)
    sized = [image.load().resize((SIDE, SIDE)) for image in images]
    flat = [torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8) for picture in sized]
    return torch.stack(flat).view(-1, SIDE, SIDE, 3).permute(0, 3, 1, 2).double()


def ssim(a: Tensor, b: Tensor) -> Tensor:  # (N, 3, H, W), (N, 3, H, W) in [0, 255] -> (N,)
    """Return the structural similarity of pairs, in [-1, 1]: a uniform window, sample variances, the mean of colours.
    Wang et al., 2004, with the settings of scikit-image that CoMM takes."""
    mean = [avg_pool2d(x, WINDOW, 1) for x in (a, b)]
    scale = WINDOW**2 / (WINDOW**2 - 1)
    (aa, bb, ab) = (avg_pool2d(x * y, WINDOW, 1) for x, y in ((a, a), (b, b), (a, b)))
    var_a, var_b, cov = (scale * (square - mean[i] * mean[j]) for square, i, j in ((aa, 0, 0), (bb, 1, 1), (ab, 0, 1)))
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    above = (2 * mean[0] * mean[1] + c1) * (2 * cov + c2)
    return (above / ((mean[0] ** 2 + mean[1] ** 2 + c1) * (var_a + var_b + c2))).mean((1, 2, 3))


def psnr(a: Tensor, b: Tensor) -> Tensor:  # (N, 3, H, W), (N, 3, H, W) in [0, 255] -> (N,)
    """Return the peak signal-to-noise ratio of pairs in dB, at most `BEST_PSNR`."""
    error = (a - b).square().mean((1, 2, 3))
    return (10 * (255**2 / error).log10()).clamp(max=BEST_PSNR)


def all_pairs(made: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:  # (N, ...), (M, ...) -> (N M, ...) twice
    """Return every image of one side beside every image of the other: CoMM's scores are means over them."""
    return made.repeat_interleave(len(real), 0), real.repeat(len(made), 1, 1, 1)

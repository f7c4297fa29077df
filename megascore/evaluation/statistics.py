"""Means per token and their standard errors, paired by sample."""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor

__all__ = ["Estimate", "ratio"]


class Estimate(NamedTuple):
    """A mean per token, and how far another draw of samples would move it."""

    mean: float
    standard_error: float
    """NaN where there is a single sample."""


def ratio(sums: Tensor, tokens: Tensor) -> Estimate:
    """Return the mean per token of something that was added up by sample, with its standard error over samples.

    Samples may have different numbers of tokens: the error is that of a ratio of two means (Cochran, Sampling
    Techniques, 1977, section 6.5). Differences of two models on the same samples make it that of a paired comparison.

    Args:
        sums: [samples] float64.
        tokens: [samples] float64, the tokens of each sample; samples without any count for nothing.
    """
    used = tokens > 0
    sums, tokens = sums[used], tokens[used]
    total = float(tokens.sum())
    if not total:
        return Estimate(math.nan, math.nan)
    mean = float(sums.sum()) / total
    number = len(sums)
    if number < 2:
        return Estimate(mean, math.nan)
    squares = float((sums - mean * tokens).square().sum())
    return Estimate(mean, math.sqrt(squares * number / (number - 1)) / total)

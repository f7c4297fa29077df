"""How sure a score is: what it would be without each group of steps in turn, and what follows from that.

Standard errors are the delete-one-group jackknife's (Efron and Tibshirani, An Introduction to the Bootstrap, 11.5). The
expected overlap of two runs of as much data is taken from halves of the groups: the score of a half is the mean of its
groups' pseudo-values, and the part of the lowest units in which two halves differ shrinks with the square root of the
data, as the errors do.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

__all__ = ["FRACTION", "Measured", "Uncertainty", "overlaps", "uncertainties"]

FRACTION = 0.25
"""Part of the units that a plan would take."""
BATCH_BYTES = 1 << 25
"""Of the replicates of vectors that are looked at together."""
MAX_SPLITS = 7
"""Ways to halve the groups that are tried; 8 groups have 35."""


@dataclass(frozen=True, eq=False)
class Uncertainty:
    """How sure the scores of one vector are."""

    standard_error: Tensor
    """[n] float64, of each score."""
    overlap: float | None
    """Expected part of the lowest quarter (one at least, of each group of units that compete) that two such runs have
    in common; None where no unit competes with another."""
    num_groups: int
    """Groups of steps that it is known from."""
    num_tokens: int
    """Tokens of the run."""

    def tokens_for(self, overlap: float) -> int | None:
        """Return how many tokens a run would need to be expected to have this overlap, as many as it had at least.

        None where no unit competes with another.

        Raises:
            ValueError: it is no number between 0 and 1.
        """
        if not 0 < overlap < 1:
            raise ValueError(f"overlap is {overlap}: expected a number between 0 and 1.")
        if self.overlap is None:
            return None
        factor = ((1 - self.overlap) / (1 - overlap)) ** 2
        return math.ceil(self.num_tokens * max(1.0, factor))


@dataclass(frozen=True)
class Measured:
    """A vector of scores, and what is needed to say how sure it is."""

    score: Tensor
    """[n] float64."""
    replicates: Tensor
    """Scores without each group of steps that has data, scaled to all of it: [groups, n] float64."""
    num_competing: int = 1
    """In how many groups of equal size, one after the other, units compete."""
    unseen: tuple[int, ...] = ()
    """Units that were not measured."""


def uncertainties(vectors: Mapping[str, Measured], num_tokens: int) -> dict[str, Uncertainty]:
    """Return how sure vectors are, by their keys; those of fewer than two groups of steps are left out.

    Args:
        vectors: By any keys.
        num_tokens: Tokens of the run.
    """
    alike: dict[tuple[int, int, int], list[str]] = {}
    for key, own in vectors.items():
        num_groups, num_units = own.replicates.shape
        if num_groups > 1:
            alike.setdefault((num_groups, num_units, own.num_competing), []).append(key)
    found: dict[str, Uncertainty] = {}
    for (num_groups, num_units, _), keys in alike.items():
        # Thousands of experts have vectors of one shape.
        at_once = max(1, BATCH_BYTES // (8 * num_groups * num_units))
        for start in range(0, len(keys), at_once):
            part = keys[start : start + at_once]
            found.update(zip(part, _of_one_shape([vectors[key] for key in part], num_tokens), strict=True))
    return {key: found[key] for key in vectors if key in found}


def _of_one_shape(vectors: Sequence[Measured], num_tokens: int) -> list[Uncertainty]:
    replicates = torch.stack([own.replicates for own in vectors])
    num_groups = replicates.shape[1]
    deviations = replicates - replicates.mean(1, keepdim=True)
    errors = (deviations.square().sum(1) * (num_groups - 1) / num_groups).sqrt()
    parts = _overlaps(vectors, replicates)
    return [Uncertainty(error, part, num_groups, num_tokens) for error, part in zip(errors, parts, strict=True)]


def overlaps(uncertainty: Mapping[str, Uncertainty]) -> dict[str, float]:
    """Return the expected overlap of each target and method: the mean over its vectors, by ``target/method``.

    Of a target that is ranked over the whole model, the model's vector alone counts. Those of which nothing is known
    are left out.

    Args:
        uncertainty: By ``site/target/method``.
    """
    found: dict[str, dict[str, float]] = {}
    for key, own in uncertainty.items():
        site, _, name = key.partition("/")
        if own.overlap is not None:
            found.setdefault(name, {})[site] = own.overlap
    # "decoder" is the site of vectors of the whole model.
    means = {name: sites.get("decoder", sum(sites.values()) / len(sites)) for name, sites in found.items()}
    return dict(sorted(means.items()))


def _overlaps(vectors: Sequence[Measured], replicates: Tensor) -> list[float | None]:
    """Return the expected overlap of each vector, given all replicates [vectors, groups, n]."""
    num_vectors, num_groups, num_units = replicates.shape
    num_competing = vectors[0].num_competing
    size = num_units // num_competing
    if size < 2:
        return [None] * num_vectors
    count = max(1, math.floor(size * FRACTION + 1e-9))
    scores = torch.stack([own.score for own in vectors]).unsqueeze(1)
    pseudo = num_groups * scores - (num_groups - 1) * replicates
    for number, own in enumerate(vectors):
        if own.unseen:
            pseudo[number, :, list(own.unseen)] = torch.inf
    common = torch.zeros(num_vectors, dtype=torch.float64)
    halves = _halves(num_groups)
    for pair in halves:
        first, second = (
            _lowest(pseudo[:, half].mean(1).view(num_vectors, num_competing, size), count) for half in pair
        )
        common += (first & second).sum((1, 2)) / (num_competing * count)
    # Of halves, to begin with.
    differing = (1 - common / len(halves)) * math.sqrt(num_groups // 2 / num_groups)
    return (1 - differing).tolist()


def _halves(num_groups: int) -> list[tuple[list[int], list[int]]]:
    """Return ways to halve the groups: the first of each holds group 0; an odd group is left out."""
    half = num_groups // 2
    ones = [[0, *rest] for rest in combinations(range(1, num_groups), half - 1)]
    ones = ones[:: max(1, len(ones) // MAX_SPLITS)][:MAX_SPLITS]
    return [(one, [group for group in range(num_groups) if group not in one][:half]) for one in ones]


def _lowest(values: Tensor, count: int) -> Tensor:
    """Return which entries along the last dimension are among its ``count`` lowest: bool, the shape of ``values``."""
    chosen = torch.zeros_like(values, dtype=torch.bool)
    return chosen.scatter_(-1, torch.argsort(values, dim=-1, stable=True)[..., :count], True)

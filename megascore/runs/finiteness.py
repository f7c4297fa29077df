"""What is not finite is found at the end of the step in which it comes, and named by the module where it came first."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor

from megascore.errors import ModelError
from megascore.parallel.comm import gather_objects, max_over_world, world_rank, world_size
from megascore.scores.score_file import split_key
from megascore.sites.site import Site

__all__ = ["check_finite", "has_bad_token", "not_finite"]


def check_finite(sites: Sequence[Site], order: Sequence[str], step: int) -> None:
    """Refuse accumulators with NaN or infinity. Collective over the world: one all-reduce; waits for the device once.

    Only what counts is in them: tokens that a mask leaves out may be anything.

    Args:
        sites: Of this rank.
        order: Keys of its sites as they have run.
        step: Number of the step that ends, from 0.

    Raises:
        ModelError: on all ranks, naming the first module of the whole model, its rank and the step.
    """
    is_bad = not _all_finite([value for site in sites for value in _floats(site)])
    if not max_over_world([int(is_bad)])[0]:
        return
    found = [first for first in gather_objects(_first(sites, order) if is_bad else None) if first is not None]
    _, rank, name, score = min(found)
    raise not_finite(step, name, rank, score)


def has_bad_token(activation: Tensor, mask: Tensor | None) -> Tensor:
    """Return whether a token that counts has NaN or infinity: [] bool, on the device, for which nothing waits.

    Args:
        activation: [..., channels].
        mask: Which tokens count, bool [...]; None: all.
    """
    bad = ~activation.isfinite().all(-1)
    return (bad if mask is None else bad & mask).any()


def not_finite(step: int, name: str, rank: int, score: str) -> ModelError:
    """Return the error for a module that gives NaN or infinity.

    Args:
        step: Number of the step, from 0.
        name: Global name of the module, the first that runs of those that give such a thing.
        rank: Rank that has it.
        score: ``{target}/{method}`` for which it is looked at.
    """
    where = f" on rank {rank}" if world_size() > 1 else ""
    return ModelError(
        f"step {step}: what {name} gives{where} for {score} is NaN or infinite, the first that runs of what is scored. "
        "Check the weights of this module and of those before it, or run the model in float32. No scores are written."
    )


def _first(sites: Sequence[Site], order: Sequence[str]) -> tuple[float, int, str, str]:
    """Return layer, rank, name and score of this rank's first place that is not finite."""
    bad = {site.key: site for site in sites if not _all_finite(_floats(site))}
    first = bad[next((key for key in order if key in bad), next(iter(bad)))]
    layer = re.match(r"decoder\.layers\.(\d+)", first.place.name)
    # Outside of the layers is what stands behind them, but for embeddings.
    last = -1.0 if first.place.name.startswith("embedding") else float("inf")
    _, target, method = split_key(first.key)
    score = f"{target}/{method}"
    return float(layer[1]) if layer else last, world_rank(), first.place.name, score


def _floats(site: Site) -> list[Tensor]:
    values = site.hook.state.values()
    return [value for value in values if value.is_floating_point() and not value.is_meta and value.numel()]


def _all_finite(values: Sequence[Tensor]) -> bool:
    if not values:
        return True
    # The largest of each: one kernel for many small accumulators, which no sum can make overflow.
    largest = torch._foreach_norm(list(values), float("inf"))
    return bool(torch.stack([value.to(largest[0].device) for value in largest]).isfinite().all())

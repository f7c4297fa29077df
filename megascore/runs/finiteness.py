"""What is not finite is found at the end of the step in which it comes, and named by the module where it came first."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megascore.errors import ModelError
from megascore.parallel.comm import world_rank, world_size
from megascore.sites.site import Site

__all__ = ["check_finite"]


def check_finite(sites: Sequence[Site], order: Sequence[str], step: int) -> None:
    """Refuse accumulators with NaN or infinity. Not collective; waits for the device once.

    Only what counts is in them: tokens that a mask leaves out may be anything.

    Args:
        sites: Of this rank.
        order: Keys of its sites as they have run.
        step: Number of the step that ends, from 0.

    Raises:
        ModelError: naming the first module, the rank and the step.
    """
    values = [value for site in sites for value in _floats(site)]
    if not values or _all_finite(values):
        return
    bad = {site.key: site for site in sites if not _all_finite(_floats(site))}
    first = bad[next((key for key in order if key in bad), next(iter(bad)))]
    where = f" (on rank {world_rank()})" if world_size() > 1 else ""
    raise ModelError(
        f"step {step}: what {first.place.name} gives{where} for {first.request.target}/{first.request.method} is NaN "
        f"or infinite; of the {len(sites)} scored places here {len(bad)} are not finite, and this one is the first "
        "that runs. Check the weights of this module and of those before it, or run the model in float32. No scores "
        "are written."
    )


def _floats(site: Site) -> list[Tensor]:
    values = site.hook.state.values()
    return [value for value in values if value.is_floating_point() and not value.is_meta and value.numel()]


def _all_finite(values: Sequence[Tensor]) -> bool:
    if not values:
        return True
    # The largest of each: one kernel for many small accumulators, which no sum can make overflow.
    largest = torch._foreach_norm(list(values), float("inf"))
    return bool(torch.stack([value.to(largest[0].device) for value in largest]).isfinite().all())

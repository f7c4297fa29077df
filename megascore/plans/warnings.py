"""What a person should know of a plan before it is carried out."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from megascore.plans.orders import ScoreOrders
from megascore.plans.ranges import ranges_text
from megascore.plans.sizes import sizes_of_parent
from megascore.plans.units import Units
from megascore.scores.assemble import layer_of
from megascore.scores.score_file import Scores, split_key
from megascore.scores.uncertainty import overlaps
from megascore.weights.huggingface.config import HuggingFaceModelConfig

__all__ = ["warnings_of"]

LITTLE_SPREAD = 1.5
"""Scores whose 90th percentile is less than this times the 10th say little about which units can go."""
FEW_EXPERTS = 64
"""Of so many experts or fewer a quarter has been seen to cost most of a model's ability (Moonlight, 64 experts:
gsm8k 0.83 to 0.66), where of 128 it costs little (llm-compressor's table of REAP)."""

SURE = 0.8
"""Expected overlap of two runs below which a person should know of it."""


def warnings_of(
    scores: Scores, config: HuggingFaceModelConfig, sizes: Mapping[str, int], units: Units, orders: ScoreOrders
) -> list[str]:
    """Return warnings, as sentences.

    Args:
        scores: What ranked the units.
        config: The parent.
        sizes: What stays, by target.
        units: The same, by unit.
        orders: The orders that were asked for, which know what no token reached.
    """
    before = sizes_of_parent(config)
    cut = [target for target in sizes if sizes[target] < before[target]]
    found = [_spread_warning(scores, target, orders.methods[target]) for target in cut if target in orders.methods]
    warnings = [text for text in found if text]
    if "experts" in cut and before["experts"] <= FEW_EXPERTS:
        warnings.append(
            f"the model has {before['experts']} experts in a layer: with few experts each is needed more, whatever the "
            "size of the model. Evaluate before you train."
        )
    return warnings + _unsure_warnings(scores, cut, orders) + _unreached_warnings(units, orders)


def _unsure_warnings(scores: Scores, cut: list[str], orders: ScoreOrders) -> list[str]:
    known = overlaps(scores.uncertainty)
    found = {target: known.get(f"{target}/{orders.methods[target]}") for target in cut if target in orders.methods}
    return [
        f"{target}: another run on as much text is expected to agree on {100 * part:.0f} % of the lowest quarter only. "
        "Score more tokens to be surer ('megascore show' says how many)."
        for target, part in found.items()
        if part is not None and part < SURE
    ]


def _spread_warning(scores: Scores, target: str, method: str) -> str | None:
    keys = [key for key in scores if key.endswith(f"/{target}/{method}")]
    if target == "hidden_size":
        keys = [f"decoder/{target}/{method}"]
    ratios = []
    for key in keys:
        seen = torch.ones(len(scores[key]), dtype=torch.bool)
        seen[list(scores.unseen.get(key, []))] = False
        measured = scores[key][seen]
        if len(measured) > 1:
            low, high = torch.quantile(measured, torch.tensor([0.1, 0.9], dtype=torch.float64)).tolist()
            ratios.append(high / low if low > 0 else float("inf"))
    if not ratios:
        return None
    median = sorted(ratios)[len(ratios) // 2]
    if median >= LITTLE_SPREAD:
        return None
    return (
        f"the scores of {target} hardly differ (90th over 10th percentile {median:.2f} in the median): they say little "
        "about which units can go."
    )


def _unreached_warnings(units: Units, orders: ScoreOrders) -> list[str]:
    warnings = []
    for key, unseen in orders.unreached.items():
        site, target, _ = split_key(key)
        if unseen == "all":
            warnings.append(f"no token reached {site}: which of its channels go is by their number alone.")
        elif target == "experts":
            kept = units.of_layers[layer_of(site)].experts if layer_of(site) in units.of_layers else ()
            gone = [expert for expert in unseen if expert not in kept]
            if gone:
                warnings.append(
                    f"layer {layer_of(site)}: no token reached the experts {ranges_text(gone)}, and they go. Other "
                    "text may need them."
                )
        else:
            warnings.append(f"no token reached {ranges_text(unseen)} of {site} ({target}): those go first.")
    return warnings

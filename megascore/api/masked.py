"""The door to masks: a model in its layout computes what a plan's smaller model would."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn

from megascore.api.attach import view_of
from megascore.errors import PlanError
from megascore.masks.masked import masked_view
from megascore.plans.plan import Plan
from megascore.sites.places import ModelView

__all__ = ["masked_units"]


@contextmanager
def masked_units(model: nn.Module | Sequence[nn.Module], plan: Plan) -> Iterator[None]:
    """Let a model compute what the smaller model of a plan would, inside of the ``with`` block.

    The model keeps its weights and its layout, and gives its old results behind the block, also after an error. On
    every layout the results are those of the pruned folder, up to rounding. Every rank calls it; no rank waits for
    another in it.

    Args:
        model: A Megatron-Core model, the list of its virtual-pipeline chunks on this rank, or a plain PyTorch model.
        plan: What stays.

    Raises:
        PlanError: the plan is for a model of other sizes, or drops what can't be masked in this one: features behind
            a norm that is not RMSNorm, experts of an unknown router.
        ModelError: the model is of no known kind.
    """
    view = view_of(model)
    _check(view, plan)
    with masked_view(view, plan.units, plan.sizes_before["attention_heads"]):
        yield


def _check(view: ModelView, plan: Plan) -> None:
    names = {
        "num_layers": "layers",
        "hidden_size": "hidden_size",
        "num_attention_heads": "attention_heads",
        "num_kv_heads": "kv_heads",
        "num_experts": "experts",
    }
    for fact, target in names.items():
        found, wanted = view.facts.get(fact), plan.sizes_before.get(target)
        if found != wanted:
            raise PlanError(
                f"the plan is for a model with {target} {wanted}, and this one has {found}: take the model that the "
                "plan was made for."
            )

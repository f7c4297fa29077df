"""The parallel form of every hook: the hook itself, which knows its place."""

from __future__ import annotations

from functools import cache

from megascore.hooks import ForwardHook, IterativeChannelContributionHook, RouterWeightedNormHook
from megascore.parallel.placed import PlacedHook
from megascore.parallel.placed_experts import PlacedRouterWeightedNormHook
from megascore.parallel.placed_iterative import PlacedIterativeHook

__all__ = ["placed"]

OWN_FORMS: dict[type[ForwardHook], type[PlacedHook]] = {
    IterativeChannelContributionHook: PlacedIterativeHook,
    RouterWeightedNormHook: PlacedRouterWeightedNormHook,
}
"""Forms of hooks whose formula needs more from other ranks than sums of its statistics."""


@cache
def placed(hook: type[ForwardHook]) -> type[PlacedHook]:
    """Return the class of a hook that gives global results at a place: a subclass of ``hook``.

    The form follows from the declared statistics alone, but for hooks of `OWN_FORMS` and their subclasses.
    """
    form = next((own for plain, own in OWN_FORMS.items() if issubclass(hook, plain)), PlacedHook)
    bases = (form,) if hook in form.__mro__ else (form, hook)
    return type(f"Placed{hook.__name__}", bases, {"__doc__": f"`{hook.__name__}` at a place.", "__module__": __name__})

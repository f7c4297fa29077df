"""What a run has found, before it becomes a score file."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from megascore.errors import HookStateError
from megascore.scores.score_file import split_key
from megascore.sites.places import ModelView
from megascore.sites.targets import TARGETS

__all__ = ["Results", "run_metadata"]


@dataclass(frozen=True)
class Results:
    """Merged results of sites, by their keys: the same on every rank."""

    states: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    """Statistics, on the CPU."""
    scores: dict[str, Tensor] = field(default_factory=dict)
    """Finished scores [units] float64, on the CPU; zeros where no token was seen."""

    def update(self, others: Results) -> None:
        """Add the results of other sites."""
        self.states.update(others.states)
        self.scores.update(others.scores)

    def require_data(self) -> None:
        """Refuse results of nothing.

        Raises:
            HookStateError: no tokens have been seen.
        """
        if not any(int(state["num_tokens"]) for state in self.states.values()):
            raise HookStateError(
                "no activations collected: run forward passes between attach() and finish(). (A function that "
                "torch.compile compiled before attach() calls no hooks: call torch.compiler.reset() after attach().)"
            )

    def warn_of_uneven_data(self) -> None:
        """Warn where places that see every token have seen different numbers of them."""
        counts = {
            key: int(state["num_tokens"])
            for key, state in self.states.items()
            if not TARGETS[split_key(key).target].routed
        }
        most, least = max(counts, key=counts.__getitem__, default=""), min(counts, key=counts.__getitem__, default="")
        if counts and 0 < counts[least] < counts[most]:
            warnings.warn(
                f"{split_key(most).site} has seen {counts[most]} tokens, {split_key(least).site} {counts[least]}: a "
                "forward pass has ended early (was its error caught?), or a module runs more than once in each. Scores "
                "of places that saw other tokens do not compare.",
                stacklevel=3,
            )


def run_metadata(view: ModelView, num_steps: int, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a score file says of a run, with the entries of ``metadata``; those on the model are added."""
    return {
        "num_steps": num_steps,
        "model": {**view.facts, **metadata.get("model", {})},
        "layout": dict(view.layout),
        **{name: value for name, value in metadata.items() if name != "model"},
    }

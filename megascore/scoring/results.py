"""What a run has found, before it becomes a score file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from megascore.errors import HookStateError
from megascore.scoring.places import ModelView

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
                "no activations collected: run forward passes between attach() and finish(). Of a model that "
                "torch.compile made, attach to that, not to the one it was made of."
            )


def run_metadata(view: ModelView, num_steps: int, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a score file says of a run, with the entries of ``metadata``; those on the model are added."""
    return {
        "num_steps": num_steps,
        "model": {**view.facts, **metadata.get("model", {})},
        "layout": dict(view.layout),
        **{name: value for name, value in metadata.items() if name != "model"},
    }

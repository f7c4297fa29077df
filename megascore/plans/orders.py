"""Orders of units, from the most important one to the one that goes first: by scores, at random, by weight norm."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from megascore.errors import PlanError
from megascore.plans.spans import check_span, is_of_spans, span_values
from megascore.scores.assemble import MODEL_SITE, layer_of
from megascore.scores.ranking import known_target
from megascore.scores.score_file import Scores, Unseen, split_key

__all__ = ["Orders", "RandomOrders", "ScoreOrders", "Unit"]

EXPERT = re.compile(r"\.experts\.(?:local_experts\.)?(\d+)\.")

Unit = tuple[str, int | None, int | None]
"""What is ordered: the target, the layer, and the expert; None where that does not apply."""


class Orders(Protocol):
    """Something that can say which units matter."""

    def values(self, target: str, layer: int | None, expert: int | None, size: int) -> Tensor:
        """Return one number for each of ``size`` units, [size] float64; the lowest goes first.

        Raises:
            PlanError: nothing is known of them.
        """


class ScoreOrders:
    """Orders by the scores of a file; units that no token reached come last, and are told."""

    def __init__(self, scores: Scores, methods: Mapping[str, str]) -> None:
        """Look up which vectors there are.

        Args:
            scores: The file.
            methods: The method that ranks a target, where the file has several.

        Raises:
            PlanError: a method is named that the file does not have.
            ScoreFileError: the file has a target that this version does not know.
        """
        self._scores = scores
        self._unseen = scores.unseen
        self._asked = dict(methods)
        self.methods: dict[str, str] = {}
        """The method of each target that was asked for so far."""
        self.unreached: dict[str, Unseen] = {}
        """What no token reached of what was asked for so far, by key of the score file."""
        self._keys: dict[str, dict[str, dict[Unit, str]]] = {}
        for key in (*scores, *(key for key, entry in self._unseen.items() if entry == "all")):
            site, target, method = split_key(key)
            if known_target(key, target).whole_model is not None:
                unit: Unit = (target, None, None)
                if site != MODEL_SITE:
                    continue
            else:
                expert = EXPERT.search(f"{site}.") if target == "expert_ffn" else None
                unit = (target, layer_of(site), None if expert is None else int(expert[1]))
            self._keys.setdefault(target, {}).setdefault(method, {})[unit] = key
        for target, method in self._asked.items():
            if method not in self._keys.get(target, {}):
                there = ", ".join(self._keys.get(target, {})) or "none"
                raise PlanError(f"method.{target}={method}: the score file has {there} for this target.")

    def values(self, target: str, layer: int | None, expert: int | None, size: int) -> Tensor:
        """See `Orders`."""
        method = self._method(target)
        unit = (target, layer, expert)
        key = self._keys[target][method].get(unit)
        if key is None:
            raise PlanError(f"the score file has no {target}/{method} of {_words(unit)}: score it with this target.")
        unseen = self._unseen.get(key, [])
        of_spans = is_of_spans(target, method)
        if unseen and not of_spans:
            self.unreached[key] = unseen
        if unseen == "all":
            if expert is None:
                raise PlanError(f"no token reached {key} when it was scored, so nothing ranks {_words(unit)}.")
            # An expert that no token reached: one channel is as good as another.
            return torch.zeros(size, dtype=torch.float64)
        values = self._scores[key]
        if len(values) != size:
            raise PlanError(
                f"the score file has {len(values)} scores for {key}, and the model has {size} units there: they are "
                "of different models."
            )
        if of_spans:
            return span_values(values, unseen)
        # Below all that was measured, which may be negative.
        values[unseen] = -torch.inf
        return values

    def check_kept(self, target: str, num_kept: int) -> None:
        """Refuse a number of units to keep that the scores of a target say nothing about; after `values`.

        Raises:
            PlanError: target ``layers`` was scored by spans of another number of layers than go.
        """
        method = self.methods.get(target, "")
        if is_of_spans(target, method):
            key = self._keys[target][method][target, None, None]
            unseen, num_units = self._unseen.get(key, []), len(self._scores[key])
            assert unseen != "all", "values() has refused it"
            check_span(unseen, num_units, num_units - num_kept)

    def _method(self, target: str) -> str:
        methods = self._keys.get(target, {})
        if not methods:
            there = ", ".join(self._keys) or "nothing"
            raise PlanError(f"the score file has no scores of {target}; it has scores of {there}.")
        if target not in self._asked and len(methods) > 1:
            raise PlanError(f"{target} was scored by {', '.join(methods)}: choose one, method.{target}=...")
        self.methods[target] = self._asked.get(target, next(iter(methods)))
        return self.methods[target]


class RandomOrders:
    """Orders at random, the same for the same seed, whatever else is asked for."""

    def __init__(self, seed: int) -> None:
        """Keep the seed."""
        self._seed = seed

    def values(self, target: str, layer: int | None, expert: int | None, size: int) -> Tensor:
        """See `Orders`."""
        # A sum of the letters would make two targets equal.
        name = "/".join(str(part) for part in (self._seed, target, layer, expert))
        seed = int.from_bytes(name.encode(), "little") % (2**63 - 1)
        return torch.rand(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _words(unit: Unit) -> str:
    target, layer, expert = unit
    of_expert = "" if expert is None else f"expert {expert} of "
    return target if layer is None else f"{of_expert}layer {layer}"

"""Rankings: groups of entries that compete, and those that would go first."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from megascore.errors import ScoreFileError
from megascore.scores.assemble import MODEL_SITE
from megascore.scores.score_file import Scores, split_key
from megascore.sites.targets import TARGETS, Target

__all__ = ["Ranking", "known_target", "rankings"]


@dataclass(frozen=True, eq=False)
class Ranking:
    """One vector whose entries compete with each other, all together or inside groups of consecutive ones."""

    key: str
    """Key in the score file."""
    site: str
    target: str
    method: str
    values: torch.Tensor
    """[n] float64; low = goes first."""
    groups: int = 1
    """Number of consecutive groups of equal size; only entries of one group compete."""
    unseen: frozenset[int] = frozenset()
    """Entries that no token reached; they have no place in the order."""

    @property
    def group_size(self) -> int:
        """Entries of one group, measured or not."""
        return len(self.values) // self.groups

    @property
    def measured(self) -> torch.Tensor:
        """The values that were measured, in channel order: [n - unseen] float64."""
        return self.values[[index for index in range(len(self.values)) if index not in self.unseen]]

    def ascending(self) -> list[int]:
        """Return the measured indices, group after group, least important first inside each; ties by smaller index."""
        return [index for group in self._groups_ascending() for index in group]

    def count_per_group(self, fraction: float) -> int:
        """Return ``floor(group size * fraction)``: what may go in one group without taking more than the fraction.

        Raises:
            ValueError: `fraction` is outside 0..1.
        """
        if not 0.0 <= fraction <= 1.0:
            raise ValueError(f"fraction is {fraction}: expected a number from 0 to 1.")
        # The small number undoes rounding such as 100 * 0.29 = 28.999999999999996.
        return math.floor(self.group_size * fraction + 1e-9)

    def lowest(self, fraction: float) -> list[int]:
        """Return the indices that would go first, group after group, least important first inside each.

        Takes `count_per_group` measured entries of every group, fewer where a group has not so many: at 3 heads per
        group and 25 % that is none. Unseen entries are never among them: nothing is known about them.
        """
        count = self.count_per_group(fraction)
        return [index for group in self._groups_ascending() for index in group[:count]]

    def _groups_ascending(self) -> list[list[int]]:
        order: list[int] = self.values.argsort(stable=True).tolist()
        grouped: list[list[int]] = [[] for _ in range(self.groups)]
        for index in order:
            if index not in self.unseen:
                grouped[index // self.group_size].append(index)
        return grouped


def rankings(scores: Scores) -> list[Ranking]:
    """Return the units in which things compete, in the order of the file.

    - ``attention_heads``: heads inside each KV group, of which a layer may have its own number; all heads of the layer
      where each has a KV head of its own.
    - ``hidden_size``: only the model-wide vector, as one feature runs through all norms.
    - everything else: one ranking for each vector; that of ``layers`` is model-wide.

    Raises:
        ScoreFileError: attention heads don't split evenly into the model's KV heads.
    """
    found = []
    for key, values in scores.items():
        site, target, method = split_key(key)
        ranked = known_target(key, target)
        if ranked.whole_model is not None and site != MODEL_SITE:
            continue
        groups = 1 if ranked.groups is None else _num_groups(scores, key, len(values), ranked.groups)
        unseen = scores.unseen.get(key, [])
        assert unseen != "all", "a vector that is unseen as a whole is not in the mapping"
        found.append(Ranking(key, site, target, method, values, groups, frozenset(unseen)))
    return found


def known_target(key: str, name: str) -> Target:
    """Return the target of an entry of a score file.

    Raises:
        ScoreFileError: this version has no such target, so nothing says what competes with what.
    """
    if name not in TARGETS:
        raise ScoreFileError(
            f"'{key}' is of the target '{name}', which this version of megascore does not know (it knows "
            f"{', '.join(TARGETS)}): read the file with the version that wrote it."
        )
    return TARGETS[name]


def _num_groups(scores: Scores, key: str, num_units: int, fact: str) -> int:
    of_model = scores.metadata.get("model", {}).get(fact)
    num_groups = scores.metadata.get("sites", {}).get(key, {}).get("groups", of_model)
    if not isinstance(num_groups, int) or num_groups < 1 or num_units % num_groups:
        raise ScoreFileError(
            f"'{key}' has {num_units} heads and metadata model.{fact} is {num_groups!r}: "
            "expected a number of KV heads that divides them, to rank heads inside their group."
        )
    return 1 if num_groups == num_units else num_groups

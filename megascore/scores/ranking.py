"""What competes with what, and which entries would go first."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from megascore.errors import ScoreFileError
from megascore.scores.assemble import MODEL_SITE
from megascore.scores.score_file import Scores, split_key

__all__ = ["Ranking", "rankings"]


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

    - ``attention_heads``: heads inside each KV group; all heads of the layer where each has a KV head of its own.
    - ``hidden_size``: only the model-wide vector, as one feature runs through all norms.
    - everything else: one ranking for each vector; that of ``layers`` is model-wide.

    Raises:
        ScoreFileError: attention heads don't split evenly into the model's KV heads.
    """
    found = []
    for key, values in scores.items():
        site, target, method = split_key(key)
        if target == "hidden_size" and site != MODEL_SITE:
            continue
        groups = _num_kv_groups(scores, key, len(values)) if target == "attention_heads" else 1
        unseen = scores.unseen.get(key, [])
        assert unseen != "all", "a vector that is unseen as a whole is not in the mapping"
        found.append(Ranking(key, site, target, method, values, groups, frozenset(unseen)))
    return found


def _num_kv_groups(scores: Scores, key: str, num_heads: int) -> int:
    num_kv_heads = scores.metadata.get("model", {}).get("num_kv_heads")
    if not isinstance(num_kv_heads, int) or num_kv_heads < 1 or num_heads % num_kv_heads:
        raise ScoreFileError(
            f"'{key}' has {num_heads} heads and metadata model.num_kv_heads is {num_kv_heads!r}: "
            "expected a number of KV heads that divides them, to rank heads inside their group."
        )
    return 1 if num_kv_heads == num_heads else num_kv_heads

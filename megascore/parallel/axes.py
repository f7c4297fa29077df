"""Axes of the parallel world, the role that each plays at a place, and this rank's part of a statistic there."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import Enum

import torch
from torch import Tensor

from megascore.errors import LayoutError
from megascore.hooks.statistics import Merge, Statistic

__all__ = ["Axis", "Placement", "Role", "Shard", "describe", "in_own_dtype"]


class Role(Enum):
    """What an axis splits at a place. Each axis has exactly one role there."""

    SHARD = "shard"
    """Channels: every rank holds other channels of the same tokens."""
    SUM = "sum"
    """Samples: every rank sees other samples."""
    SUM_SEQUENCE = "sum*"
    """The sequence of each sample: every rank sees other tokens of the same samples."""
    SAME = "same"
    """Nothing: every rank sees the same, and one counts."""
    OWN = "own"
    """Places: every rank has other layers or experts, so nothing is shared."""


@dataclass(frozen=True)
class Axis:
    """This rank's position on one parallel axis."""

    name: str
    rank: int
    size: int


@dataclass(frozen=True)
class Shard:
    """This rank's channels among all of a place."""

    offset: int
    length: int
    total: int

    def __post_init__(self) -> None:
        """Refuse a shard that lies outside.

        Raises:
            LayoutError: with the three numbers.
        """
        if not 0 <= self.offset <= self.offset + self.length <= self.total:
            raise LayoutError(f"channels {self.offset} to {self.offset + self.length} do not lie in 0 to {self.total}.")


@dataclass(frozen=True)
class Placement:
    """The roles of all axes at one place, and this rank's channels there."""

    shard: Shard
    roles: tuple[tuple[Axis, Role], ...] = field(default=())
    copies: int = 1
    """How often the ranks together see each token here, all roles considered: sums over tokens are divided by it."""

    @classmethod
    def whole(cls, num_channels: int, roles: tuple[tuple[Axis, Role], ...] = (), copies: int = 1) -> Placement:
        """Return a placement where this rank has all ``num_channels`` channels."""
        return cls(Shard(0, num_channels, num_channels), roles, copies)

    def __post_init__(self) -> None:
        """Refuse roles that contradict the shard.

        Raises:
            LayoutError: an axis given twice, or channels split without an axis that splits them.
        """
        names = [axis.name for axis, _ in self.roles]
        if len(set(names)) != len(names):
            raise LayoutError(f"an axis has two roles at one place: {', '.join(names)}.")
        splits = [axis.name for axis, role in self.roles if role is Role.SHARD and axis.size > 1]
        if self.shard.length != self.shard.total and not splits:
            raise LayoutError(
                f"this rank has {self.shard.length} of {self.shard.total} channels, but no axis splits channels here."
            )

    def by_units(self, size: int) -> Placement:
        """Return the placement of units of ``size`` channels that follow one another, such as heads.

        Raises:
            LayoutError: a unit is spread over ranks.
        """
        shard = self.shard
        if any(number % size for number in (shard.offset, shard.length, shard.total)):
            raise LayoutError(
                f"channels {shard.offset} to {shard.offset + shard.length} of {shard.total} are no whole heads of "
                f"{size}: take a tensor-parallel size that divides the heads."
            )
        return replace(self, shard=Shard(shard.offset // size, shard.length // size, shard.total // size))

    def axes(self, role: Role) -> tuple[Axis, ...]:
        """Return the axes larger than 1 that play ``role`` here."""
        return tuple(axis for axis, own in self.roles if own is role and axis.size > 1)

    @property
    def splits_samples(self) -> bool:
        """True where other ranks hold other tokens of this rank's samples."""
        return bool(self.axes(Role.SUM_SEQUENCE))

    def contribution(self, statistic: Statistic, local: Tensor) -> Tensor:
        """Return what this rank adds to the sum over all ranks, [global shape] float64.

        The sum over the world of all contributions is the merged statistic: channels stand at their global position,
        a value that several ranks hold is given by one of them, everything else is zero. float64 holds counts exactly
        up to 2**53.

        Args:
            statistic: In global terms.
            local: This rank's accumulator.
        """
        merged = torch.zeros(statistic.shape, dtype=torch.float64, device=local.device)
        if self._counts(statistic):
            self.local_view(statistic, merged).copy_(local)
        return merged / self.copies if self._is_copied(statistic) else merged

    def local_part(self, statistic: Statistic, merged: Tensor) -> Tensor:
        """Return this rank's accumulator after loading: all contributions of it add up to ``merged`` again.

        Of ranks that see other data the first takes everything and the others start from zero.
        """
        first = all(axis.rank == 0 for axis, role in self.roles if _effective(role, statistic) is Role.SUM)
        part = self.local_view(statistic, merged).to(statistic.dtype)
        if self._is_copied(statistic):
            part = part * self.copies
        return part.clone() if first else torch.zeros_like(part)

    def local_view(self, statistic: Statistic, merged: Tensor) -> Tensor:
        """Return the view of a tensor of global shape that belongs to this rank's channels."""
        if statistic.channel_dim is None:
            return merged
        return merged.narrow(statistic.channel_dim, self.shard.offset, self.shard.length)

    def _is_copied(self, statistic: Statistic) -> bool:
        """Tell whether copies of a token add to a statistic: not to the number of calls, for they come together."""
        return self.copies > 1 and statistic.merge is Merge.SUM and not statistic.of_samples

    def _counts(self, statistic: Statistic) -> bool:
        """Tell whether this rank is the one that gives a value which several ranks hold."""
        return all(axis.rank == 0 for axis, role in self.roles if _effective(role, statistic) is Role.SAME)


def _effective(role: Role, statistic: Statistic) -> Role:
    """Return what an axis with ``role`` at a place does to one statistic there."""
    if role is Role.SHARD and statistic.channel_dim is None:
        return Role.SAME
    if statistic.merge is Merge.REPLICATED and role in (Role.SUM, Role.SUM_SEQUENCE):
        return Role.SAME
    if role is Role.SUM_SEQUENCE:
        return Role.SAME if statistic.of_samples else Role.SUM
    return role


def in_own_dtype(statistic: Statistic, summed: Tensor) -> Tensor:
    """Return a float64 sum of `Placement.contribution` in the statistic's dtype; counts are rounded."""
    return summed.to(statistic.dtype) if statistic.dtype.is_floating_point else summed.round().to(statistic.dtype)


def describe(placement: Placement) -> str:
    """Return the roles in one line for people, such as ``tp=shard dp=sum``; ``-`` where no axis is larger than 1."""
    return " ".join(f"{axis.name}={role.value}" for axis, role in placement.roles if axis.size > 1) or "-"

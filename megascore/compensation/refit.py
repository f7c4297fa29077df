"""The sums behind one output projection's new weights, and their solution, in any parallel layout.

An output projection (of attention, an MLP, an expert) adds ``X W^T`` to the residual stream, for its inputs X, tokens
by channels. X are those of the smaller model, whose earlier layers have their new weights already, before the channels
that go are taken away. What is left, ``Z`` of the kept channels, gets weights V that minimize the squared difference of
``Z V^T`` and ``X W^T`` over tokens, with a ridge that keeps them near the old ones, W at the kept channels (W_k): with
``V = W_k + D`` and ``R = X W^T - Z W_k^T``, what the channels that go have added,

    (Z^T Z + lambda I) D^T = Z^T R,    lambda = ridge x mean of the diagonal of Z^T Z.

All sums are float64. (Fitting to what the parent adds, with the parent's own X, makes up for less: parts then work
against what the residual stream has lost before them.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megascore.hooks.weights import whole_weight
from megascore.parallel.axes import Axis, Role
from megascore.parallel.comm import sum_in_place
from megascore.sites.places import Place

__all__ = ["RIDGE", "Refit", "Solved"]

RIDGE = 0.03
"""Part of the mean of the Gram matrix's diagonal that is added to it. With the calibration text that people have, there
are few tokens for each unknown: on 8,192 tokens of SmolLM2, a quarter of the FFN channels gone, the loss rose by 0.220
with 0.003, 0.214 with 0.01, 0.203 with 0.03, 0.191 with 0.1 and 0.190 with 0.3; with a third of the heads gone by 0.253
with 0.01, 0.264 with 0.03 and 0.313 with 0.1. The middle serves both."""
TOKENS_AT_ONCE = 1024
"""Whose inputs are gathered over tensor-parallel ranks, in float64."""


@dataclass(frozen=True)
class Solved:
    """New weights, and what they leave of the error."""

    own_columns: Tensor
    """[E, this rank's kept channels] float64, in the order of `Refit.own_kept`."""
    weight: Tensor
    """[E, kept channels] float64, in the order of the plan; the same on all ranks that share the place."""
    bias: Tensor | None
    """What is added to the bias, [E] float64; None for least squares."""
    error_left: float
    """Squared error with the new weights, over that without the channels that go."""
    num_tokens: int


class Refit:
    """Adds up over tokens what the new weights of one output projection follow from, on this rank."""

    def __init__(self, place: Place, kept: Sequence[int]) -> None:
        """Allocate; not collective.

        Args:
            place: The projection's.
            kept: Global numbers of the channels that stay, in the order of the smaller model.
        """
        self.place = place
        self._kept = torch.tensor(kept)
        shard = place.placement.shard
        is_own = (self._kept >= shard.offset) & (self._kept < shard.offset + shard.length)
        self._positions = is_own.nonzero().flatten()
        self._own_kept = self._kept[is_own] - shard.offset
        num_outputs, num_own = self.weight.shape[0], len(self._own_kept)
        self._gram = self._zeros(num_own, len(kept))
        self._cross = self._zeros(num_own, num_outputs)
        self._missing = self._zeros(num_outputs)
        self._error = self._zeros(())
        self._num_tokens = self._zeros(())

    @property
    def own_kept(self) -> Tensor:
        """Local numbers of this rank's kept channels, in the order of the smaller model, [k] int64 on the CPU."""
        return self._own_kept

    @property
    def positions(self) -> Tensor:
        """Places of `own_kept` among all channels that stay, [k] int64 on the CPU."""
        return self._positions

    @cached_property
    def weight(self) -> Tensor:
        """The projection's weight, [E, this rank's channels]; shares memory with the module's."""
        return self.weight_of(self.place)

    @staticmethod
    def weight_of(place: Place) -> Tensor:
        """Return the weight of a projection, [E, this rank's channels]; shares memory with the module's."""
        module: Any = place.module if place.scored_module is None else place.scored_module()
        return whole_weight(module.weight).detach()

    @torch.no_grad()
    def add(self, inputs: Tensor, mask: Tensor | None) -> None:
        """Add tokens. Collective over the axes that split the channels: their ranks bring the same tokens.

        Args:
            inputs: The smaller model's inputs before channels are taken away, [..., this rank's channels].
            mask: Which tokens count, bool, the shape without channels; None for all.
        """
        x = inputs.reshape(-1, inputs.shape[-1])
        if mask is not None:
            x = x[mask.reshape(-1).nonzero().flatten()]
        own, kept = self._own_kept.to(x.device), self._kept.to(x.device)
        goes = torch.ones(x.shape[1], dtype=torch.bool, device=x.device).index_fill_(0, own, False).nonzero().flatten()
        weight = self.weight.double()[:, goes]
        for start in range(0, len(x), TOKENS_AT_ONCE):
            some = x[start : start + TOKENS_AT_ONCE].double()
            own_z = some[:, own]
            missing = some[:, goes] @ weight.T
            for group in self._groups(Role.SHARD):
                dist.all_reduce(missing, group=group)
            self._gram += own_z.T @ self._all_channels(some)[:, kept]
            self._cross += own_z.T @ missing
            self._missing += missing.sum(0)
            self._error += missing.square().sum()
            self._num_tokens += len(some)

    def solve_least_squares(self, ridge: float = RIDGE) -> Solved | None:
        """Return the new weights; None where no token came. Collective over all ranks that share the place."""
        if not self._add_up():
            return None
        gram, cross = self._whole(self._gram), self._whole(self._cross)
        gram.diagonal().add_(ridge * gram.diagonal().mean())
        # Each rank solves for a share of the outputs.
        change = torch.zeros_like(cross)
        columns = _share(cross.shape[1], self._sharding_axes())
        factor = torch.linalg.cholesky(gram)
        change[:, columns] = torch.cholesky_solve(cross[:, columns], factor)
        for group in self._groups(Role.SHARD):
            dist.all_reduce(change, group=group)
        old = self._whole(self.weight.double()[:, self._own_kept.to(self.weight.device)].T.contiguous())
        gram.diagonal().sub_(ridge * gram.diagonal().mean() / (1 + ridge))
        left = float(self._error - 2 * (change * cross).sum() + (change * (gram @ change)).sum())
        weight = (old + change).T
        own = weight[:, self._positions.to(weight.device)]
        return Solved(own, weight, None, self._part(left), int(self._num_tokens))

    def solve_bias(self) -> Solved | None:
        """Return the old weights and the mean of what is missing as a bias; None where no token came.

        Collective over all ranks that share the place.
        """
        if not self._add_up():
            return None
        mean = self._missing / self._num_tokens
        own = self.weight.double()[:, self._own_kept.to(self.weight.device)]
        left = float(self._error - self._num_tokens * mean.square().sum())
        return Solved(own, self._whole(own.T.contiguous()).T, mean, self._part(left), int(self._num_tokens))

    @property
    def is_first(self) -> bool:
        """Whether this rank is the first of those that share the place: one of them writes."""
        return all(axis.rank == 0 for axis, role in self.place.placement.roles if role is not Role.OWN)

    def _add_up(self) -> bool:
        """Add up over the ranks that have other tokens; tell whether there are any."""
        sums = [self._gram, self._cross, self._missing, self._error, self._num_tokens]
        for role in (Role.SUM, Role.SUM_SEQUENCE):
            for group in self._groups(role):
                sum_in_place(sums, group)
        return bool(self._num_tokens > 0)

    def _part(self, left: float) -> float:
        before = float(self._error)
        return max(left, 0.0) / before if before else 1.0

    def _all_channels(self, inputs: Tensor) -> Tensor:
        """Return inputs [t, all channels] of inputs [t, this rank's channels]."""
        for group in self._groups(Role.SHARD):
            parts = [torch.empty_like(inputs) for _ in range(dist.get_world_size(group))]
            dist.all_gather(parts, inputs.contiguous(), group=group)
            inputs = torch.cat(parts, dim=1)
        return inputs

    def _whole(self, own_rows: Tensor) -> Tensor:
        """Return rows of all kept channels [kept, ...] of those of this rank [k, ...], in the order of the plan."""
        whole = own_rows.new_zeros(len(self._kept), *own_rows.shape[1:])
        whole[self._positions.to(whole.device)] = own_rows
        for group in self._groups(Role.SHARD):
            dist.all_reduce(whole, group=group)
        return whole

    def _sharding_axes(self) -> tuple[Axis, ...]:
        return self.place.placement.axes(Role.SHARD)

    def _groups(self, role: Role) -> list[dist.ProcessGroup]:
        return [self.place.groups[axis.name] for axis in self.place.placement.axes(role)]

    def _zeros(self, *shape: Any) -> Tensor:
        return torch.zeros(*shape, dtype=torch.float64, device=self.weight.device)


def _share(length: int, axes: Sequence[Axis]) -> slice:
    """Return this rank's share of ``length`` columns, over the ranks of the axes."""
    rank, size = 0, 1
    for axis in axes:
        rank, size = rank * axis.size + axis.rank, size * axis.size
    return slice(length * rank // size, length * (rank + 1) // size)

"""MomentsHook: sums of an activation's numbers, their sizes and squares, from which many methods compute a score."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from megascore.errors import HookStateError
from megascore.hooks.statistics import State, Statistic
from megascore.hooks.weights import WeightHook, weight_matrix
from megascore.kernels import reductions
from megascore.kernels.exact import exact
from megascore.kernels.reductions import Moment

if TYPE_CHECKING:
    # In typing itself from Python 3.11 on.
    from typing_extensions import Self

__all__ = ["MomentsHook"]

OF_TOKENS = {"sum_of_abs": Moment.ABS, "sum_of_values": Moment.VALUE, "sum_of_squares": Moment.SQUARE}
"""Statistics that are sums over tokens, and of what."""
OF_SAMPLES = {"sum_of_means": Moment.ABS, "sum_of_squared_means": Moment.ABS, "sum_of_norms": Moment.SQUARE}
"""Statistics that are sums over samples of a function of the sample's own sum over its tokens, and of what that is:
of the mean size, of its square, and of the root of the sum of squares."""
WEIGHT_NORM = "weight_norm"


class MomentsHook(WeightHook):
    """Scores channels by the activations of a module's input, and by the weights that they meet.

    A subclass names a method, says in ``keeps`` which statistics it needs (names of `OF_TOKENS` and `OF_SAMPLES`, and
    ``weight_norm``, the norms of the weight's columns), and computes the score from them. At a place where several such
    methods are asked for, one hook keeps what all of them need, and reads the activation once.

    Inputs are [S, B, C], sequence first, or [S, C], which is one sample; where no statistic is of samples any leading
    dimensions will do. Samples without a token that counts add nothing.
    """

    keeps: ClassVar[tuple[str, ...]] = ()
    """Names of `OF_TOKENS` and `OF_SAMPLES`, and ``weight_norm``: the norms of the weight's columns."""

    routed: ClassVar[bool] = False
    """Whether inputs are tokens that a router sends to one expert, without an order or a sample."""

    def __init__(self, module: nn.Module | None = None, activation_hooks_kwargs: Any = None) -> None:
        """Start with no data; take the norms of the weight's columns where they are kept.

        Args:
            module: nn.Linear, or a layer with ``weight`` [E, C] and ``input_size``; not used where no norms are kept.
            activation_hooks_kwargs: Not used; callers that make all hooks alike pass it.
        """
        norms = None
        if WEIGHT_NORM in self.keeps:
            if module is None:
                raise HookStateError(f"{self._score_name()} needs the linear layer whose inputs it scores.")
            norms = reductions.column_norms(weight_matrix(module, self._score_name(), may_be_shard=self.takes_shards))
        super().__init__(norms)
        self._of_samples = tuple(name for name in OF_SAMPLES if name in self.keeps)
        self._of_tokens = tuple(name for name in OF_TOKENS if name in self.keeps)
        needed = {OF_SAMPLES[name] for name in self._of_samples}
        self._waiting_kinds = tuple(kind for kind in Moment if kind in needed)
        needed |= {OF_TOKENS[name] for name in self._of_tokens}
        self._kinds = tuple(kind for kind in Moment if kind in needed)
        self._pending: list[Tensor] = []

    @classmethod
    def at(cls, module: nn.Module, num_units: int, options: Mapping[str, Any]) -> Self:
        """Return a hook for a module, which only a score with weights needs."""
        return cls(module) if WEIGHT_NORM in cls.keeps else cls()

    def declare(self, num_channels: int) -> tuple[Statistic, ...]:
        """Return what is kept, whatever the order of ``keeps``; with statistics of samples also their number."""
        unknown = set(self.keeps) - {WEIGHT_NORM, *OF_TOKENS, *OF_SAMPLES}
        assert not unknown, f"{type(self).__name__} keeps {unknown}"
        shape = (num_channels,)
        of_tokens = [Statistic(name, shape, channel_dim=0) for name in OF_TOKENS if name in self.keeps]
        of_samples = [
            Statistic(name, shape, channel_dim=0, of_samples=True) for name in OF_SAMPLES if name in self.keeps
        ]
        if of_samples:
            of_samples.append(Statistic("num_samples", (), torch.int64, of_samples=True))
        return (*super().declare(num_channels), *of_tokens, *of_samples)

    @exact
    def observe(self, inputs: Tensor, output: Tensor, token_mask: Tensor | None = None) -> None:
        """Add one call; ``inputs`` is [S, B, C] or [S, C], ``token_mask`` [S, B] or [S]. Not collective."""
        if self.routed and inputs.dim() != 2:
            raise HookStateError(
                f"{type(self).__name__} takes the tokens routed to one expert, [tokens, channels], "
                f"got the shape {list(inputs.shape)}."
            )
        if not self._of_samples:
            self._begin_call(inputs, token_mask)
            if self._kinds:
                self._add_tokens(reductions.moments(inputs, token_mask, self._kinds))
            return
        x = self._sequence_first(inputs)
        mask = None if token_mask is None else token_mask.reshape(x.shape[:2])
        self.allocate(x.shape[2], x.device)
        self._note_dtype(x)
        num_tokens = reductions.num_tokens(x, mask)
        self._count_tokens(num_tokens)
        if self.defers:
            self._observe_parts(x, mask)
            return
        self._count_call(num_tokens)
        step = reductions.samples_at_once(x)
        for start in range(0, x.shape[1], step):
            some = x[:, start : start + step]
            part = None if mask is None else mask[:, start : start + step]
            sums = reductions.moments_of_samples(some, part, self._kinds)
            self._add_tokens([values.sum(0) for values in sums] if self._of_tokens else [])
            waiting = [values for kind, values in zip(self._kinds, sums, strict=True) if kind in self._waiting_kinds]
            if part is None:
                self._fold_whole_samples(waiting, x.shape[0])
            else:
                self._fold(waiting, part.sum(0))

    def pending(self) -> list[Tensor]:
        """Return, for each call that waits, sums over the sequence [B, C] of each kind, and counts [B]; float64."""
        return list(self._pending)

    def pending_numbers(self, num_samples: int) -> int:
        """Return the size of what waits for the sums of ``num_samples`` samples."""
        if not self.defers or not self._of_samples:
            return 0
        return num_samples * (len(self._waiting_kinds) * (self.num_channels or 0) + 1)

    def settle(self, summed: list[Tensor]) -> None:
        """Add the calls that waited, their parts summed over the ranks that share the sequences."""
        size = len(self._waiting_kinds) + 1
        for start in range(0, len(summed), size):
            *sums, counts = summed[start : start + size]
            self._count_call(counts.sum())
            self._fold(sums, counts)
        self._pending = []

    def restore(self, local: State) -> None:
        """Replace the accumulators, and forget what waited."""
        self._pending = []
        super().restore(local)

    @classmethod
    def compute(cls, state: State, *, num_calls: float = 1.0) -> dict[str, Tensor]:
        """Compute the score; a class that serves several methods has none of its own."""
        raise AssertionError(f"{cls.__name__} computes no score of its own")

    def _observe_parts(self, x: Tensor, mask: Tensor | None) -> None:
        seq_len, num_samples, _ = x.shape
        counts = x.new_full((num_samples,), seq_len, dtype=torch.int64) if mask is None else mask.sum(0)
        sums = dict(zip(self._kinds, reductions.moments_of_samples(x, mask, self._kinds), strict=True))
        self._add_tokens([values.sum(0) for values in sums.values()] if self._of_tokens else [])
        self._pending += [*(sums[kind] for kind in self._waiting_kinds), counts.double()]

    def _add_tokens(self, sums: Iterable[Tensor]) -> None:
        """Add sums over tokens, one [C] for each kind that is measured."""
        found = dict(zip(self._kinds, sums, strict=False))
        for name in self._of_tokens:
            self._state[name] += found[OF_TOKENS[name]]

    def _fold(self, sums: list[Tensor], counts: Tensor) -> None:
        """Add samples, given what their tokens add up to [B, C] for each kind that waits, and their tokens [B]."""
        num_tokens = counts.clamp(min=1).unsqueeze(-1)
        found = dict(zip(self._waiting_kinds, sums, strict=True))
        if "sum_of_norms" in self._of_samples:
            self._state["sum_of_norms"] += found[Moment.SQUARE].sqrt().sum(0)
        if Moment.ABS in found:
            means = found[Moment.ABS] / num_tokens
            if "sum_of_means" in self._of_samples:
                self._state["sum_of_means"] += means.sum(0)
            if "sum_of_squared_means" in self._of_samples:
                self._state["sum_of_squared_means"] += means.square_().sum(0)
        self._state["num_samples"] += (counts > 0).sum()

    def _fold_whole_samples(self, sums: list[Tensor], seq_len: int) -> None:
        """Add samples of ``seq_len`` tokens each; overwrites ``sums``."""
        if not seq_len:
            return
        found = dict(zip(self._waiting_kinds, sums, strict=True))
        if "sum_of_norms" in self._of_samples:
            self._state["sum_of_norms"] += found[Moment.SQUARE].sqrt_().sum(0)
        if "sum_of_means" in self._of_samples:
            self._state["sum_of_means"].add_(found[Moment.ABS].sum(0), alpha=1 / seq_len)
        if "sum_of_squared_means" in self._of_samples:
            self._state["sum_of_squared_means"].add_(found[Moment.ABS].square_().sum(0), alpha=seq_len**-2)
        self._state["num_samples"] += len(sums[0])

    def _sequence_first(self, inputs: Tensor) -> Tensor:
        if inputs.dim() not in (2, 3):
            raise HookStateError(
                f"{type(self).__name__} takes [sequence, samples, channels] or [tokens, channels], "
                f"got the shape {list(inputs.shape)}."
            )
        return inputs if inputs.dim() == 3 else inputs.unsqueeze(1)


MomentsHook.shared = MomentsHook

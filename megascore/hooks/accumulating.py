"""Accumulators of a hook: declared statistics, what one call adds to them, and the scores that follow from them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor

from megascore.errors import HookStateError
from megascore.hooks.method import HasMethod
from megascore.hooks.statistics import State, Statistic
from megascore.kernels import reductions

__all__ = ["AccumulatingHook"]

COMMON_STATISTICS = (
    Statistic("num_calls", (), torch.int64, of_samples=True),
    Statistic("num_tokens", (), torch.int64),
)
"""Kept by every hook: calls that brought tokens, and tokens that counted."""


class AccumulatingHook(HasMethod, ABC):
    """Adds up statistics over calls.

    A subclass says what it keeps (`declare`), does the arithmetic of one call (`observe`) and computes scores from a
    state (`compute`). Allocation and copying are done here from the declaration. Accumulators are float64 or int64,
    live on the device of the activations, and never synchronise with the host.
    """

    def __init__(self) -> None:
        """Start with no data; accumulators are allocated when the number of channels and the device are known."""
        self._state: dict[str, Tensor] = {}
        self._num_channels: int | None = None
        self._result_dtype = torch.float32

    place_name = ""
    """Global name of the module, where the hook was put at a place of a model."""
    num_features: int | None = None
    """Size of what the module gives out for a token, where the place knows it and channels are something else."""
    additive = True
    """Whether parts of the data can be measured one by one, and their statistics added up in any order."""
    is_large = False
    """Whether the statistics are many times as large as the score: kept where the method is named, and only once, so
    that there is no standard error, which takes them for each group of steps."""
    shared: ClassVar[type[AccumulatingHook] | None] = None
    """The class at the root of a family of methods that one hook can serve together; None for one that stands alone."""
    keeps: ClassVar[tuple[str, ...]] = ()
    """What a method of such a family needs, by names that the root knows."""
    reads_activations = True
    """Whether the score depends on the activations, and not only on the weights or on nothing."""
    grows_with: ClassVar[str] = "num_tokens"
    """The count that a score which grows with the data follows: scores of parts of the data are compared by it."""
    units_are_heads = False
    """Whether a channel of the hook is a head, at a place whose channels are those inside of heads."""
    takes_shards = False
    """Set in tensor-parallel subclasses: their layer's weight may be one shard of a larger one."""

    # What a subclass writes

    @abstractmethod
    def declare(self, num_channels: int) -> tuple[Statistic, ...]:
        """Return the statistics kept for ``num_channels`` channels."""

    @abstractmethod
    def observe(self, inputs: Tensor, output: Tensor, token_mask: Tensor | None = None) -> None:
        """Add one call to the statistics; decorated with `exact`, without gradients and autocast.

        Args:
            inputs: The module's input, channels last, any float dtype; not kept, not changed.
            output: The module's output, channels last; not kept, not changed.
            token_mask: bool, shape of the activation without its last dimension; False marks tokens that do not
                count (padding). None counts all.
        """

    @abstractmethod
    def compute(self, state: State, *, num_calls: float = 1.0) -> dict[str, Tensor]:
        """Compute the results from a complete state, such as one merged over ranks; pure.

        Write it as a class method where it needs nothing but the state: then a score file with these statistics can be
        scored again, and merged with others.

        Args:
            state: One tensor for each declared statistic.
            num_calls: Factor on means over tokens. 1 gives the mean itself, the number of calls gives the sum of
                means over calls of equal size, as the published hooks define it.

        Returns:
            ``score`` [num_channels] and whatever else the class reports, float64 or int64.

        Raises:
            AssertionError: no activations have been collected.
        """

    def settings(self) -> dict[str, Any]:
        """Return the constructor's choices that a saved state depends on; a state with others is refused."""
        return {}

    # State

    @property
    def state(self) -> State:
        """The accumulators of this rank, live; empty before the first call. Read only."""
        return self._state

    @property
    def num_channels(self) -> int | None:
        """Channels of this rank's accumulators; None before the first call of a hook that is not told earlier."""
        return self._num_channels

    def statistics(self, num_channels: int) -> tuple[Statistic, ...]:
        """Return all statistics kept for ``num_channels`` channels: those of every hook, then the declared ones."""
        return (*COMMON_STATISTICS, *self.declare(num_channels))

    def allocate(self, num_channels: int, device: torch.device | str) -> None:
        """Create zeroed accumulators for ``num_channels`` channels, or move those that are there to ``device``.

        Raises:
            HookStateError: there are accumulators for another number of channels.
        """
        if self._num_channels is None:
            self._num_channels = num_channels
            self._state = {statistic.name: statistic.zeros(device) for statistic in self.statistics(num_channels)}
        if self._num_channels != num_channels:
            raise HookStateError(
                f"{type(self).__name__} has seen {self._num_channels} channels, this call brings {num_channels}: "
                "use one hook for one module."
            )
        if self._state["num_calls"].device != torch.device(device):
            self._state = {name: value.to(device) for name, value in self._state.items()}

    def kept(self) -> tuple[Tensor, ...]:
        """Return all tensors that live as long as this hook, on this rank, but for what waits (see `pending`).

        A subclass that keeps more than its statistics adds it here, so that a dry run counts it.
        """
        return tuple(self._state.values())

    def merged_state(self) -> dict[str, Tensor]:
        """Return a copy of the statistics over all data, in global terms; empty before allocation.

        Here that is this process alone; tensor-parallel subclasses make it a collective call.
        """
        return {name: value.clone() for name, value in self._state.items()}

    def adopt(self, merged: State) -> None:
        """Replace the accumulators by a merged state, all data of which now counts as seen by this hook.

        Tensor-parallel subclasses keep only their own part of it; all ranks that share the place do it.
        """
        if self._num_channels is not None:
            declared = self.statistics(self._num_channels)
            self.restore({s.name: self._local_part(s, merged[s.name]) for s in declared})

    def restore(self, local: State) -> None:
        """Replace the accumulators by a copy of this rank's part of a state, and forget what waited for other ranks."""
        for name, value in self._state.items():
            value.copy_(local[name])

    def _local_part(self, statistic: Statistic, merged: Tensor) -> Tensor:
        """Return the part of a merged statistic that belongs to this hook's channels: here all of it."""
        return merged

    # Parts that must meet before they count

    defers = False
    """Set where other ranks hold parts of the same samples, or must agree before the next step.

    `observe` then leaves what it found in `pending` until `settle` is given the sum over those ranks.
    """

    def pending(self) -> list[Tensor]:
        """Return what waits for the other ranks; every rank that shares the samples has the same shapes. No copy."""
        return []

    def pending_numbers(self, num_samples: int) -> int:
        """Return how many numbers would wait after a call of ``num_samples`` samples; 0 where nothing does."""
        return 0

    def settle(self, summed: list[Tensor]) -> None:
        """Add what `pending` returned, summed over the ranks, to the statistics, and let nothing wait any more."""
        assert not summed, f"{type(self).__name__} has nothing pending"

    def _begin_call(self, activations: Tensor, token_mask: Tensor | None, num_channels: int | None = None) -> None:
        """Make the accumulators ready for a call, and count it and its tokens.

        Args:
            activations: [..., features]; all tokens of the call are its own, whole samples or not.
            token_mask: bool [...].
            num_channels: Channels that are scored; the last dimension of the activations if not given.
        """
        self.allocate(activations.shape[-1] if num_channels is None else num_channels, activations.device)
        self._note_dtype(activations)
        num_tokens = reductions.num_tokens(activations, token_mask)
        self._count_tokens(num_tokens)
        self._count_call(num_tokens)

    def _count_tokens(self, num_tokens: int | Tensor) -> None:
        """Count tokens of this rank (an int64 tensor where a mask decides)."""
        self._state["num_tokens"] += num_tokens

    def _count_call(self, num_tokens: int | Tensor) -> None:
        """Count a call of ``num_tokens`` tokens, over the ranks that share its samples; without any it is no call."""
        self._state["num_calls"] += num_tokens > 0

    def _note_dtype(self, activations: Tensor) -> None:
        """Report results in float64 when activations are; otherwise in float32, as the published hooks do."""
        if activations.dtype == torch.float64:
            self._result_dtype = torch.float64

    @classmethod
    def _require_data(cls, state: State) -> None:
        # AssertionError is the published interface's documented type for this mistake of a user.
        # Tokens beside calls: the first of the ranks that share the samples counts calls, and a mask may leave it none.
        if not state or not int(state["num_calls"] + state["num_tokens"]):
            raise AssertionError(f"{cls.__name__}: no activations collected yet; run a forward pass first.")

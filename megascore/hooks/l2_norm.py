"""L2NormHook: the norm over samples of the mean absolute activation of each channel."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from megascore.errors import HookStateError
from megascore.hooks.base import ForwardHook
from megascore.hooks.statistics import State, Statistic
from megascore.kernels import reductions
from megascore.kernels.exact import exact

__all__ = ["L2NormHook"]


class L2NormHook(
    ForwardHook,
    method="l2_norm",
    targets=("ffn", "attention_heads", "hidden_size", "shared_expert_ffn"),
    summary="norm over samples of the mean absolute activation of each sample",
):
    """Scores channels by the activations of a module's input, sequence first.

    ``a[b, c]`` is the mean over the sequence of ``abs(x[s, b, c])``, the score ``sqrt(sum over b of a[b, c]^2)``.
    It depends on what a sample is (a whole sequence), not on how samples are batched. A two-dimensional input is one
    sample. Samples without a token that counts add nothing.
    """

    def __init__(self, module: nn.Module | None = None, activation_hooks_kwargs: Any = None) -> None:
        """Start with no data.

        Args:
            module: Not used; callers that make all hooks alike pass it.
            activation_hooks_kwargs: Not used.
        """
        super().__init__()
        self._pending: list[Tensor] = []

    def declare(self, num_channels: int) -> tuple[Statistic, ...]:
        """Return the squares of the samples' means added up, and the number of samples."""
        return (
            Statistic("sum_of_squared_means", (num_channels,), channel_dim=0, of_samples=True),
            Statistic("num_samples", (), torch.int64, of_samples=True),
        )

    @exact
    def observe(self, inputs: Tensor, output: Tensor, token_mask: Tensor | None = None) -> None:
        """Add one call; ``inputs`` is [S, B, C] or [S, C], ``token_mask`` [S, B] or [S]. Not collective."""
        x = self._sequence_first(inputs)
        seq_len, num_samples, num_channels = x.shape
        mask = None if token_mask is None else token_mask.reshape(seq_len, num_samples)
        self.allocate(num_channels, x.device)
        self._note_dtype(x)
        num_tokens = reductions.num_tokens(x, mask)
        self._count_tokens(num_tokens)
        if self.defers:
            counts = x.new_full((num_samples,), seq_len, dtype=torch.int64) if mask is None else mask.sum(0)
            self._pending += [reductions.abs_sum_of_samples(x, mask), counts.double()]
            return
        self._count_call(num_tokens)
        step = reductions.samples_at_once(x)
        for start in range(0, num_samples, step):
            some = x[:, start : start + step]
            if mask is None:
                self._fold_whole_samples(reductions.abs_sum_of_samples(some), seq_len)
            else:
                part = mask[:, start : start + step]
                self._fold(reductions.abs_sum_of_samples(some, part), part.sum(0))

    def pending(self) -> list[Tensor]:
        """Return, for each call that waits, sums over the sequence [B, C] and token counts [B]; all float64."""
        return list(self._pending)

    def pending_numbers(self, num_samples: int) -> int:
        """Return the size of what waits for the sums of ``num_samples`` samples."""
        return num_samples * ((self.num_channels or 0) + 1) if self.defers else 0

    def settle(self, summed: list[Tensor]) -> None:
        """Add the calls that waited, their parts summed over the ranks that share the sequences."""
        for sums, counts in zip(summed[::2], summed[1::2], strict=True):
            self._count_call(counts.sum())
            self._fold(sums, counts)
        self._pending = []

    def compute(self, state: State, *, num_calls: float = 1.0) -> dict[str, Tensor]:
        """Return ``score`` [C]; ``num_calls`` has no part in it, as samples are added, not averaged."""
        self._require_data(state)
        return {"score": state["sum_of_squared_means"].sqrt()}

    def restore(self, local: State) -> None:
        """Replace the accumulators, and forget what waited."""
        self._pending = []
        super().restore(local)

    def _sequence_first(self, inputs: Tensor) -> Tensor:
        if inputs.dim() not in (2, 3):
            raise HookStateError(
                f"{type(self).__name__} takes [sequence, samples, channels] or [tokens, channels], "
                f"got the shape {list(inputs.shape)}."
            )
        return inputs if inputs.dim() == 3 else inputs.unsqueeze(1)

    def _fold(self, sums: Tensor, counts: Tensor) -> None:
        """Add samples, given the sums over their sequences [B, C] and how many tokens of each counted [B]."""
        means = sums / counts.clamp(min=1).unsqueeze(-1)
        self._state["sum_of_squared_means"] += means.square_().sum(0)
        self._state["num_samples"] += (counts > 0).sum()

    def _fold_whole_samples(self, sums: Tensor, seq_len: int) -> None:
        """Add samples of ``seq_len`` tokens each; overwrites ``sums``."""
        if seq_len:
            self._state["sum_of_squared_means"].add_(sums.square_().sum(0), alpha=seq_len**-2)
            self._state["num_samples"] += len(sums)

"""First-order Taylor scores: what the loss would change by without a unit, as far as its gradient tells."""

from __future__ import annotations

import torch
from torch import Tensor

from megascore.errors import HookStateError
from megascore.hooks.base import ForwardHook
from megascore.hooks.statistics import State, Statistic
from megascore.kernels import reductions

__all__ = ["HeadTaylorHook", "TaylorHook"]


class TaylorHook(
    ForwardHook,
    method="taylor",
    targets=("ffn", "layers"),
    summary="mean over samples of the squared sum over tokens of activation times gradient of the loss",
):
    """Scores a unit by ``mean over samples of (sum over tokens and channels of gradient * activation)^2``.

    The gradient is that of the sample's loss, the sum of its predicted tokens' nats; of a layer the activation is what
    the layer adds to the hidden states. The sum is minus the first-order change of the loss without the unit (Molchanov
    et al., arXiv:1906.10771, equation 8). A job runs the model backward and calls `observe_gradient`.
    """

    needs_job = True

    def __init__(self) -> None:
        """Start with no data."""
        super().__init__()
        self._pending: list[Tensor] = []

    def declare(self, num_channels: int) -> tuple[Statistic, ...]:
        """Return the sum over samples of squares, and their number; a channel is a unit."""
        return (
            Statistic("sum_of_squares", (num_channels,), channel_dim=0, of_samples=True),
            Statistic("num_samples", (), torch.int64, of_samples=True),
        )

    def observe(self, inputs: Tensor, output: Tensor, token_mask: Tensor | None = None) -> None:
        """Refuse: a forward pass has no gradient.

        Raises:
            HookStateError: always.
        """
        raise HookStateError(
            f"{type(self).__name__} can't be registered as a forward hook: it needs the gradient of the loss. Ask for "
            "it in a job, which runs the model backward: torchrun -m megascore score CONFIG."
        )

    def observe_gradient(self, activation: Tensor, gradient: Tensor, token_mask: Tensor | None = None) -> None:
        """Add one call. Not collective.

        Args:
            activation: [S, B, units * width], units side by side; this rank's tokens of whole samples.
            gradient: Of the sum of the samples' losses, the same shape.
            token_mask: Which tokens count, bool [S, B]; None: all.
        """
        if activation.dim() != 3:
            raise HookStateError(
                f"{type(self).__name__} takes [sequence, samples, channels], got {list(activation.shape)}."
            )
        num_units = self.num_channels
        assert num_units is not None, "a hook at a place is allocated"
        self._note_dtype(activation)
        num_tokens = reductions.num_tokens(activation, token_mask)
        self._count_tokens(num_tokens)
        dtype = reductions.accumulation_dtype(activation.dtype)
        products = activation.to(dtype) * gradient
        if token_mask is not None:
            products.masked_fill_(~token_mask.unsqueeze(-1), 0)
        effects = products.view(*products.shape[:2], num_units, -1).sum((0, 3), dtype=torch.float64)
        length, num_samples = activation.shape[:2]
        counts = effects.new_full((num_samples,), length) if token_mask is None else token_mask.sum(0).double()
        if self.defers:
            self._pending += [effects, counts]
        else:
            self._add(effects, counts)

    def pending(self) -> list[Tensor]:
        """Return, for each call that waits, the sums over its tokens [B, units] and their numbers [B]; float64."""
        return list(self._pending)

    def pending_numbers(self, num_samples: int) -> int:
        """Return the size of what waits for the sums of ``num_samples`` samples."""
        return num_samples * ((self.num_channels or 0) + 1) if self.defers else 0

    def settle(self, summed: list[Tensor]) -> None:
        """Add the calls that waited, their parts summed over the ranks that share the sequences."""
        for effects, counts in zip(summed[::2], summed[1::2], strict=True):
            self._add(effects, counts)
        self._pending = []

    def restore(self, local: State) -> None:
        """Replace the accumulators, and forget what waited."""
        self._pending = []
        super().restore(local)

    @classmethod
    def compute(cls, state: State, *, num_calls: float = 1.0) -> dict[str, Tensor]:
        """Return ``score`` [units], nats squared; ``num_calls`` has no part in it."""
        cls._require_data(state)
        return {"score": state["sum_of_squares"] / state["num_samples"]}

    def _add(self, effects: Tensor, counts: Tensor) -> None:
        """Add complete samples: [B, units], and how many tokens of each counted [B]."""
        self._count_call(counts.sum())
        self._state["sum_of_squares"] += effects.square().sum(0)
        self._state["num_samples"] += (counts > 0).sum()


class HeadTaylorHook(
    TaylorHook,
    method="taylor",
    targets=("attention_heads",),
    summary="mean over samples of the squared sum over tokens of activation times gradient of the loss",
):
    """Scores query heads as `TaylorHook` does, a head's channels added up before squaring."""

    units_are_heads = True

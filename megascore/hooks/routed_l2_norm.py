"""RoutedL2NormHook: the norm over routed tokens of each channel inside one expert."""

from __future__ import annotations

from torch import Tensor

from megascore.errors import HookStateError
from megascore.hooks.base import ForwardHook
from megascore.hooks.statistics import State, Statistic
from megascore.kernels import reductions
from megascore.kernels.exact import exact

__all__ = ["RoutedL2NormHook"]


class RoutedL2NormHook(
    ForwardHook, method="l2_norm", targets=("expert_ffn",), summary="norm over the routed tokens, each its own sample"
):
    """Scores channels by the tokens routed to a module: ``sqrt(sum over tokens of x^2)``.

    This is `L2NormHook` where each token is a sample of its own. The tokens of an expert come from all sequences and
    ranks in no order, so there is no sequence to take a mean over.
    """

    def declare(self, num_channels: int) -> tuple[Statistic, ...]:
        """Return the sum of squares."""
        return (Statistic("sum_of_squares", (num_channels,), channel_dim=0),)

    @exact
    def observe(self, inputs: Tensor, output: Tensor, token_mask: Tensor | None = None) -> None:
        """Add one call; ``inputs`` is [T, C], ``token_mask`` [T]. Not collective; no token is no call."""
        if inputs.dim() != 2:
            raise HookStateError(
                f"{type(self).__name__} takes the tokens routed to one expert, [tokens, channels], "
                f"got the shape {list(inputs.shape)}."
            )
        self._begin_call(inputs, token_mask)
        if token_mask is None:
            self._state["sum_of_squares"] += reductions.column_norms(inputs).square_()
            return
        for start, stop in reductions.chunks(len(inputs), inputs.shape[-1] * inputs.element_size(), inputs.device):
            rows = inputs[start:stop].masked_fill(~token_mask[start:stop].unsqueeze(-1), 0)
            self._state["sum_of_squares"] += reductions.column_norms(rows).square_()

    def compute(self, state: State, *, num_calls: float = 1.0) -> dict[str, Tensor]:
        """Return ``score`` [C]; ``num_calls`` has no part in it, as tokens are added, not averaged."""
        self._require_data(state)
        return {"score": state["sum_of_squares"].sqrt()}

"""Score of routed experts by what is lost where each gives its mean output to every token, and these means."""

from __future__ import annotations

import torch
from torch import Tensor

from megascore.errors import HookStateError
from megascore.hooks.router_weighted_norm import RouterWeightedNormHook
from megascore.hooks.statistics import State, Statistic

__all__ = ["OutputVarianceHook"]


class OutputVarianceHook(
    RouterWeightedNormHook,
    method="output_variance",
    targets=("experts",),
    summary="sum over the expert's tokens of the squared distance to its mean output, over all routed tokens",
):
    """Scores routed experts by how often they are chosen times how much their unweighted outputs vary.

    Both criteria of MoNE (arXiv:2507.00390), multiplied: the squared error, for each routed token of the layer, of an
    expert that is replaced by its mean output. The means are in the statistics, ``sum_of_outputs`` [experts, features]
    over ``tokens_per_expert``. These are large: so the score is in no recipe, and has no standard error, which would
    take eight times as many numbers.
    """

    is_large = True
    shared = None

    def declare(self, num_channels: int) -> tuple[Statistic, ...]:
        """Return the sums of outputs and of their squared norms, and the number of tokens, all by expert.

        Raises:
            HookStateError: the place does not know how many features an output has.
        """
        if self.num_features is None:
            raise HookStateError(f"{type(self).__name__}: set num_features, the size of an expert's output, first.")
        return (
            Statistic("sum_of_outputs", (num_channels, self.num_features), channel_dim=0),
            Statistic("sum_of_squared_norms", (num_channels,), channel_dim=0),
            Statistic("tokens_per_expert", (num_channels,), torch.int64, channel_dim=0),
        )

    def _add(self, experts: Tensor, inputs: Tensor, output: Tensor, token_mask: Tensor | None) -> None:
        weights = self._weights(inputs)
        for start, stop, rows in self._rows(output):
            unweighted = rows / weights[start:stop, None].to(rows.dtype)
            if token_mask is not None:
                unweighted.masked_fill_(~token_mask[start:stop, None], 0)
            unweighted = unweighted.double()
            self._state["sum_of_outputs"].index_add_(0, experts[start:stop], unweighted)
            self._state["sum_of_squared_norms"].index_add_(0, experts[start:stop], unweighted.square_().sum(-1))

    @classmethod
    def compute(cls, state: State, *, num_calls: float = 1.0) -> dict[str, Tensor]:
        """Return ``score`` and ``tokens_per_expert``, both [experts]; ``num_calls`` has no part in them."""
        cls._require_data(state)
        tokens = state["tokens_per_expert"]
        of_mean = state["sum_of_outputs"].square().sum(-1) / tokens.clamp(min=1)
        # Rounding must not make less than nothing of outputs that are all the same.
        score = (state["sum_of_squared_norms"] - of_mean).clamp(min=0) / state["num_tokens"]
        return {"score": score, "tokens_per_expert": tokens}

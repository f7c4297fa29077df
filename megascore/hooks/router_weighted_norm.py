"""RouterWeightedNormHook: how much each routed expert adds to the tokens that the router sends it."""

from __future__ import annotations

import torch
from torch import Tensor

from megascore.errors import HookStateError
from megascore.hooks.base import ForwardHook
from megascore.hooks.statistics import State, Statistic
from megascore.kernels import reductions
from megascore.kernels.exact import exact

__all__ = ["RouterWeightedNormHook"]


class RouterWeightedNormHook(
    ForwardHook,
    method="router_weighted_norm",
    targets=("experts",),
    summary="mean over the expert's tokens of norm2(router weight x output)",
):
    """Scores routed experts: the mean over an expert's tokens of ``norm2(router weight * expert output)``.

    A token counts for each expert that the router sends it to. Channels are the experts of the layer. The score of an
    expert without tokens is 0 and means nothing: ``tokens_per_expert`` tells which those are.
    """

    partial_outputs = False
    """Set where the outputs are partial sums, which `complete` adds up over the ranks that hold the other parts."""

    def declare(self, num_channels: int) -> tuple[Statistic, ...]:
        """Return the sum of norms and the number of tokens, both by expert."""
        return (
            Statistic("sum_of_norms", (num_channels,), channel_dim=0),
            Statistic("tokens_per_expert", (num_channels,), torch.int64, channel_dim=0),
        )

    @exact
    def observe(self, inputs: Tensor, output: Tensor, token_mask: Tensor | None = None) -> None:
        """Add one call of a layer's experts.

        Collective over the ranks that hold the other parts of the outputs, where there are any: all of them bring the
        same tokens. Otherwise not collective.

        Args:
            inputs: Which expert each token went to, [T] int64; not the activations, which have no part in the score.
            output: The experts' outputs times the router's weights, [T, features].
            token_mask: bool [T].

        Raises:
            HookStateError: the hook was not allocated for a number of experts, or the shapes do not fit.
        """
        if self.num_channels is None:
            raise HookStateError(
                f"{type(self).__name__}: call allocate(number of experts, device) before the first use."
            )
        if inputs.shape != output.shape[:1] or output.dim() != 2:
            raise HookStateError(
                f"{type(self).__name__} takes the expert of each token [tokens] and outputs [tokens, features], "
                f"got the shapes {list(inputs.shape)} and {list(output.shape)}."
            )
        self.allocate(self.num_channels, output.device)
        self._note_dtype(output)
        num_tokens = reductions.num_tokens(output, token_mask)
        self._count_tokens(num_tokens)
        self._count_call(num_tokens)
        norms = self._norms(output)
        counts = torch.ones_like(inputs) if token_mask is None else token_mask.to(inputs.dtype)
        if token_mask is not None:
            norms.masked_fill_(~token_mask, 0)
        self._state["sum_of_norms"].index_add_(0, inputs, norms)
        self._state["tokens_per_expert"].index_add_(0, inputs, counts)

    def compute(self, state: State, *, num_calls: float = 1.0) -> dict[str, Tensor]:
        """Return ``score`` and ``tokens_per_expert``, both [experts]; ``num_calls`` has no part in them."""
        self._require_data(state)
        tokens = state["tokens_per_expert"]
        return {"score": state["sum_of_norms"] / tokens.clamp(min=1), "tokens_per_expert": tokens}

    def complete(self, partial: Tensor) -> None:
        """Add the parts of outputs that other ranks hold to ``partial``, in place. Parallel subclasses do."""
        raise AssertionError("only a parallel subclass has partial outputs")

    def _norms(self, output: Tensor) -> Tensor:
        """Return the norm of each row of ``output`` [T, features]: [T] float64."""
        dtype = reductions.accumulation_dtype(output.dtype)
        norms = output.new_zeros(len(output), dtype=torch.float64)
        for start, stop in reductions.chunks(len(output), output.shape[-1] * dtype.itemsize, output.device):
            rows = output[start:stop].to(dtype, copy=self.partial_outputs)
            if self.partial_outputs:
                self.complete(rows)
            norms[start:stop] = torch.linalg.vector_norm(rows, dim=-1)
        return norms

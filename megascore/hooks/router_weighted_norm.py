"""Scores of routed experts: how much each adds to the tokens that the router sends it, and how many these are."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import torch
from torch import Tensor

from megascore.errors import HookStateError
from megascore.hooks.base import ForwardHook
from megascore.hooks.statistics import State, Statistic
from megascore.kernels import reductions
from megascore.kernels.exact import exact

__all__ = ["ExpertFrequencyHook", "OutputNormHook", "RouterWeightedNormHook"]

WEIGHTED, UNWEIGHTED = "sum_of_norms", "sum_of_unweighted_norms"


class RouterWeightedNormHook(
    ForwardHook,
    method="router_weighted_norm",
    targets=("experts",),
    summary="mean over the expert's tokens of norm2(router weight x output)",
):
    """Scores routed experts: the mean over an expert's tokens of ``norm2(router weight * expert output)``.

    A token counts for each expert that the router sends it to. Channels are the experts of the layer. The score of an
    expert without tokens is 0 and means nothing: ``tokens_per_expert`` tells which those are. It is REAP's criterion
    (arXiv:2510.13999). Where other methods of experts are asked for, one hook keeps what all of them need.
    """

    keeps: ClassVar[tuple[str, ...]] = (WEIGHTED,)

    partial_outputs = False
    """Set where the outputs are partial sums, which `complete` adds up over the ranks that hold the other parts."""

    def declare(self, num_channels: int) -> tuple[Statistic, ...]:
        """Return the sums of norms that are kept, and the number of tokens, all by expert."""
        sums = (
            Statistic(name, (num_channels,), channel_dim=0) for name in (WEIGHTED, UNWEIGHTED) if name in self.keeps
        )
        return (*sums, Statistic("tokens_per_expert", (num_channels,), torch.int64, channel_dim=0))

    @exact
    def observe(self, inputs: Tensor, output: Tensor, token_mask: Tensor | None = None) -> None:
        """Add one call of a layer's experts.

        Collective over the ranks that hold the other parts of the outputs, where there are any: all of them bring the
        same tokens. Otherwise not collective.

        Args:
            inputs: Which expert each token went to, [T] int64; or [T, 2] float64, that and the router's weight. Not the
                activations, which have no part in the score.
            output: The experts' outputs times the router's weights, [T, features].
            token_mask: bool [T].

        Raises:
            HookStateError: the hook was not allocated for a number of experts, the shapes do not fit, or the router's
                weights are needed and not there.
        """
        if self.num_channels is None:
            raise HookStateError(
                f"{type(self).__name__}: call allocate(number of experts, device) before the first use."
            )
        if inputs.shape[:1] != output.shape[:1] or output.dim() != 2 or inputs.shape[1:] not in ((), (2,)):
            raise HookStateError(
                f"{type(self).__name__} takes the expert of each token [tokens] and outputs [tokens, features], "
                f"got the shapes {list(inputs.shape)} and {list(output.shape)}."
            )
        self.allocate(self.num_channels, output.device)
        self._note_dtype(output)
        num_tokens = reductions.num_tokens(output, token_mask)
        self._count_tokens(num_tokens)
        self._count_call(num_tokens)
        experts = inputs if inputs.dim() == 1 else inputs[:, 0].long()
        counts = torch.ones_like(experts) if token_mask is None else token_mask.to(experts.dtype)
        self._state["tokens_per_expert"].index_add_(0, experts, counts)
        self._add(experts, inputs, output, token_mask)

    def _add(self, experts: Tensor, inputs: Tensor, output: Tensor, token_mask: Tensor | None) -> None:
        """Add what is kept beside counts; ``experts`` [T] int64, the others as `observe` is given them."""
        if not self.keeps:
            return
        norms = output.new_zeros(len(output), dtype=torch.float64)
        for start, stop, rows in self._rows(output):
            norms[start:stop] = torch.linalg.vector_norm(rows, dim=-1)
        if token_mask is not None:
            norms.masked_fill_(~token_mask, 0)
        if WEIGHTED in self.keeps:
            self._state[WEIGHTED].index_add_(0, experts, norms)
        if UNWEIGHTED in self.keeps:
            self._state[UNWEIGHTED].index_add_(0, experts, norms / self._weights(inputs))

    def _weights(self, inputs: Tensor) -> Tensor:
        """Return the router's weights [T]; a weight of 0 is 1, as nothing can be known of an output times 0."""
        if inputs.dim() == 1:
            raise HookStateError(
                f"{type(self).__name__} needs the router's weight of each token, which this model's experts are not "
                "given or apply to their inputs: leave what is scored by unweighted outputs out of the scores."
            )
        return inputs[:, 1].masked_fill(inputs[:, 1] == 0, 1)

    @classmethod
    def compute(cls, state: State, *, num_calls: float = 1.0) -> dict[str, Tensor]:
        """Return ``score`` and ``tokens_per_expert``, both [experts]; ``num_calls`` has no part in them."""
        cls._require_data(state)
        tokens = state["tokens_per_expert"]
        return {"score": state["sum_of_norms"] / tokens.clamp(min=1), "tokens_per_expert": tokens}

    def complete(self, partial: Tensor) -> None:
        """Add the parts of outputs that other ranks hold to ``partial``, in place. Parallel subclasses do."""
        raise AssertionError("only a parallel subclass has partial outputs")

    def _rows(self, output: Tensor) -> Iterator[tuple[int, int, Tensor]]:
        """Yield the whole ``output`` [T, features] in parts: first row, the row behind the last, and the rows."""
        dtype = reductions.accumulation_dtype(output.dtype)
        for start, stop in reductions.chunks(len(output), output.shape[-1] * dtype.itemsize, output.device):
            rows = output[start:stop].to(dtype, copy=self.partial_outputs)
            if self.partial_outputs:
                self.complete(rows)
            yield start, stop, rows


class ExpertFrequencyHook(
    RouterWeightedNormHook,
    method="frequency",
    targets=("experts",),
    summary="part of all routed tokens that the expert gets",
):
    """Scores routed experts by how often the router chooses them."""

    keeps = ()

    @classmethod
    def compute(cls, state: State, *, num_calls: float = 1.0) -> dict[str, Tensor]:
        """Return ``score`` and ``tokens_per_expert``, both [experts]."""
        cls._require_data(state)
        tokens = state["tokens_per_expert"]
        return {"score": tokens.double() / state["num_tokens"], "tokens_per_expert": tokens}


class OutputNormHook(
    RouterWeightedNormHook,
    method="output_norm",
    targets=("experts",),
    summary="sum over the expert's tokens of norm2(output), over all routed tokens",
):
    """Scores routed experts: ``sum over its tokens of norm2(output)``, unweighted, over the number of routed tokens.

    It is the Expert Activation Norm (EAN) of arXiv:2504.05586, which grows with how often an expert is chosen.
    """

    keeps = (UNWEIGHTED,)

    @classmethod
    def compute(cls, state: State, *, num_calls: float = 1.0) -> dict[str, Tensor]:
        """Return ``score`` and ``tokens_per_expert``, both [experts]."""
        cls._require_data(state)
        score = state[UNWEIGHTED] / state["num_tokens"]
        return {"score": score, "tokens_per_expert": state["tokens_per_expert"]}


RouterWeightedNormHook.shared = RouterWeightedNormHook

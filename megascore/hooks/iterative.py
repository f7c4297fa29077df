"""IterativeChannelContributionHook: prunes the least contributing channels a few at a time, on paper."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from megascore.errors import ConfigError, HookStateError
from megascore.hooks.contributions import Contributions
from megascore.hooks.schedule import num_pruned_after, pruning_schedule
from megascore.hooks.statistics import Merge, State, Statistic
from megascore.hooks.weights import WeightHook, output_bias, weight_matrix
from megascore.kernels import reductions
from megascore.kernels.exact import exact

if TYPE_CHECKING:
    # In typing itself from Python 3.11 on.
    from typing_extensions import Self

__all__ = ["IterativeChannelContributionHook", "prune_lowest"]

CALIBRATION_METHODS = (None, "scale_by_magnitude")


class IterativeChannelContributionHook(
    WeightHook,
    method="iterative_contribution",
    targets=("ffn", "shared_expert_ffn"),
    summary="rank in which channels are pruned on paper, some in each step",
    options=("iterations", "calibration_method"),
):
    """Ranks the input channels of a linear layer by the order in which iterative pruning would remove them.

    Each call is one iteration: it measures how much the layer's output would change if each remaining channel went too,
    and marks the channels with the least contribution as pruned. The layer itself is never changed.

    Where `defers` is set, calls add up what they measure, and `settle` ends the iteration with the sum over all ranks.
    """

    additive = False

    def __init__(self, linear_layer: nn.Module, activation_hooks_kwargs: Mapping[str, Any]) -> None:
        """Plan the iterations.

        Args:
            linear_layer: nn.Linear, or a layer with ``weight`` [E, C] and ``input_size``.
            activation_hooks_kwargs: ``validation_full_iters``, the number of iterations; ``calibration_method``, None
                (the default) or "scale_by_magnitude"; ``clear_gpu_memory`` has no effect, as memory is bounded anyway.

        Raises:
            HookStateError: an unknown calibration method, or no number of iterations.
        """
        self._calibration_method = activation_hooks_kwargs.get("calibration_method")
        if self._calibration_method not in CALIBRATION_METHODS:
            raise HookStateError(
                f"unknown calibration_method {self._calibration_method!r}; expected None or 'scale_by_magnitude'."
            )
        num_iterations = activation_hooks_kwargs.get("validation_full_iters")
        if not isinstance(num_iterations, int) or num_iterations < 1:
            raise HookStateError(
                f"activation_hooks_kwargs['validation_full_iters'] must be a positive integer; got {num_iterations!r}."
            )
        self._layer = linear_layer
        self._num_iterations = num_iterations
        self._iteration = 0
        self._sums: list[Tensor] | None = None
        super().__init__(reductions.column_norms(self._weight()))
        self._index_channels()

    @classmethod
    def at(cls, module: nn.Module, num_units: int, options: Mapping[str, Any]) -> Self:
        """Return a hook for a linear layer; a step of the run is an iteration."""
        return cls(
            module,
            {"validation_full_iters": options["iterations"], "calibration_method": options.get("calibration_method")},
        )

    @classmethod
    def check_options(cls, options: Mapping[str, Any]) -> None:
        """Refuse a number of iterations that is missing or no positive number, or an unknown calibration.

        Raises:
            ConfigError: naming what came.
        """
        iterations, calibration = options.get("iterations"), options.get("calibration_method")
        if not isinstance(iterations, int) or isinstance(iterations, bool) or iterations < 1:
            raise ConfigError(
                f"method 'iterative_contribution' has iterations={iterations!r}: expected the number of pruning "
                "iterations, which is the number of steps of the run."
            )
        if calibration not in CALIBRATION_METHODS:
            raise ConfigError(f"calibration_method is {calibration!r}: expected null or 'scale_by_magnitude'.")

    @classmethod
    def num_steps(cls, options: Mapping[str, Any]) -> int:
        """Return the number of iterations: each step is one."""
        return int(options["iterations"])

    def settings(self) -> dict[str, Any]:
        """Return the schedule and the calibration method."""
        return {"validation_full_iters": self._num_iterations, "calibration_method": self._calibration_method}

    def declare(self, num_channels: int) -> tuple[Statistic, ...]:
        """Return what has been decided so far; all of it is the same on ranks that agree."""
        return (
            *super().declare(num_channels),
            Statistic("curr_iter", (), torch.int64, Merge.REPLICATED),
            # 1 for the channel pruned first; 0 for one that is not pruned.
            Statistic("prune_position", (num_channels,), torch.int64, Merge.REPLICATED, channel_dim=0),
            Statistic("agg_contribution", (num_channels,), merge=Merge.REPLICATED, channel_dim=0),
        )

    @property
    def curr_iter(self) -> int:
        """Iterations done."""
        return self._iteration

    @property
    def pruning_schedule(self) -> list[int]:
        """Number of channels, of the whole layer, that each iteration prunes."""
        return pruning_schedule(self._total_channels(), self._num_iterations)

    def get_progress_info(self) -> dict[str, Any]:
        """Return iterations and pruned channels, done and in all."""
        return {
            "curr_iter": self._iteration,
            "total_iters": self._num_iterations,
            "progress": self._iteration / self._num_iterations,
            "pruned_channels_count": self._num_pruned(),
            "total_channels": self._total_channels(),
        }

    def kept(self) -> tuple[Tensor, ...]:
        """Return the statistics, and the indices of the channels that are left and of those that are pruned."""
        return (*super().kept(), self._kept_index, self._pruned_index)

    @exact
    def observe(self, inputs: Tensor, output: Tensor, token_mask: Tensor | None = None) -> None:
        """Add one call: the whole of an iteration unless `defers` is set.

        Collective over the ranks that hold the layer's shards, in tensor-parallel subclasses.

        Args:
            inputs: [..., C].
            output: [..., E], including the layer's bias where the layer adds it.
            token_mask: bool [...].

        Raises:
            HookStateError: all iterations are done.
        """
        if self._has_no_tokens(inputs, token_mask):
            return
        if self._iteration >= self._num_iterations:
            raise HookStateError(
                f"{type(self).__name__} has done all of its {self._num_iterations} iterations; this call is one too "
                "many. Make validation_full_iters the number of calls, or remove the hook after it."
            )
        self.allocate(inputs.shape[-1], inputs.device)
        measure = Contributions(
            self._weight().detach(),
            output_bias(self._layer) if self._calibration_method else None,
            self._pruned_index if self._num_pruned() else None,
            self._kept_index,
            self._state["weight_norm"],
            self._calibration_method,
            self._reduce_over_shards,
        )
        sums, count = self.pending()
        own_sums = self._own_channels(sums)
        for (x, y), mask in reductions.token_views([inputs, output], token_mask):
            own_sums[self._kept_index] += measure.sums(x, y, mask)
        num_tokens = reductions.num_tokens(inputs, token_mask)
        count += num_tokens
        self._count_tokens(num_tokens)
        if not self.defers:
            self._advance(sums, count)

    def pending(self) -> list[Tensor]:
        """Return what waits: contributions added over tokens [C], and the number of tokens []; float64."""
        if self._sums is None:
            with torch.inference_mode(False):
                zeros = torch.zeros_like(self._state["agg_contribution"])
                self._sums = [zeros, zeros.new_zeros(())]
        return self._sums

    def pending_numbers(self, num_samples: int) -> int:
        """Return the size of what waits at the end of an iteration, whatever the number of samples."""
        return self._total_channels() + 1 if self.defers else 0

    def settle(self, summed: list[Tensor]) -> None:
        """End the iteration, given what all ranks measured; without a token it is no iteration. Reads the count."""
        if int(summed[1]):
            self._advance(*summed)

    def restore(self, local: State) -> None:
        """Replace the decisions by those of a saved state, and forget what waited."""
        super().restore(local)
        self._sums = None
        self._iteration = int(local["curr_iter"])
        self._index_channels()

    def compute(self, state: State, *, num_calls: float = 1.0) -> dict[str, Tensor]:
        """Return ``score`` [C] int64, 0 = least important, and ``channels_importance_ascending`` [C] int64.

        Raises:
            HookStateError: iterations are missing, one had no token that counts, or something was not finite.
        """
        self._require_data(state)
        done = int(state["curr_iter"])
        if done < self._num_iterations:
            raise HookStateError(
                f"{type(self).__name__} has done {done} of {self._num_iterations} iterations "
                f"({int((state['prune_position'] > 0).sum())} of {len(state['prune_position'])} channels are ranked): "
                "run the rest first."
            )
        if int(state["num_calls"]) < done:
            raise HookStateError(
                f"{type(self).__name__}: the mask of an iteration left no token, so what it pruned means nothing; "
                "leave out calls without tokens."
            )
        if not bool(state["agg_contribution"].isfinite().all()):
            raise HookStateError(
                f"{type(self).__name__} has seen activations or weights that are NaN or infinite, so its order means "
                "nothing: check the weights, or run the model in float32."
            )
        score = state["prune_position"] - 1
        return {"score": score, "channels_importance_ascending": torch.argsort(score)}

    def _reduce_over_shards(self, residual: Tensor) -> Tensor:
        """Return ``residual`` [T, E] added up over the ranks that hold the other channels; here there are none."""
        return residual

    def _own_channels(self, values: Tensor) -> Tensor:
        """Return the view of ``values``, shaped like the decisions, that belongs to the channels of the inputs."""
        return values

    def _weight(self) -> Tensor:
        return weight_matrix(self._layer, self._score_name(), may_be_shard=self.takes_shards)

    def _total_channels(self) -> int:
        """Channels of the whole layer."""
        total = self._global_num_channels()
        assert total is not None
        return total

    def _num_pruned(self) -> int:
        """Channels of the whole layer pruned so far: known from the schedule, without asking the device."""
        return num_pruned_after(self._iteration, self._total_channels(), self._num_iterations)

    def _num_pruned_here(self, pruned: Tensor) -> int:
        """Count ``pruned``, bool by channel of the inputs; here those are all channels, and the schedule tells."""
        return self._num_pruned()

    def _prune(self, number: int) -> None:
        """Mark ``number`` more channels of the whole layer as pruned, those with the smallest sums of contributions."""
        state = self._state
        positions = prune_lowest(state["agg_contribution"], state["prune_position"], number, self._num_pruned())
        state["prune_position"].copy_(positions)

    def _index_channels(self) -> None:
        """Set the indices of this rank's kept channels and of its pruned ones, both ascending."""
        pruned = self._own_channels(self._state["prune_position"]) > 0
        order = torch.argsort(pruned.to(torch.int8), stable=True)
        num_kept = len(order) - self._num_pruned_here(pruned)
        self._kept_index, self._pruned_index = order[:num_kept], order[num_kept:]

    def _advance(self, sums: Tensor, count: Tensor) -> None:
        # The count is 0 where a mask on a GPU empties a call: `compute` tells, for here nobody may wait for it.
        self._state["agg_contribution"] += sums / count.clamp(min=1)
        number = (
            num_pruned_after(self._iteration + 1, self._total_channels(), self._num_iterations) - self._num_pruned()
        )
        if number:
            self._prune(number)
            # What is not finite stays so, and is found at the end of the step, or in `compute`.
            self._state["agg_contribution"].mul_(0)
        self._iteration += 1
        self._state["curr_iter"].fill_(self._iteration)
        self._count_call(count)
        self._sums = None
        if number:
            self._index_channels()

    def _has_no_tokens(self, inputs: Tensor, token_mask: Tensor | None) -> bool:
        """Say whether a call is empty, as far as the host knows; where calls wait, an empty one adds zeros instead."""
        if inputs.shape[:-1].numel() == 0:
            return True
        return not self.defers and token_mask is not None and token_mask.device.type == "cpu" and not token_mask.any()


def prune_lowest(contribution: Tensor, prune_position: Tensor, number: int, num_pruned: int) -> Tensor:
    """Return positions with ``number`` more channels pruned: the smallest contributions first, ties by smaller index.

    Args:
        contribution: [C] float64.
        prune_position: [C] int64, 0 for a channel that is not pruned, of which there are ``num_pruned`` fewer than C.
        number: Channels to prune.
        num_pruned: Channels pruned before.

    Returns:
        [C] int64.
    """
    kept = torch.argsort((prune_position > 0).to(torch.int8), stable=True)[: len(prune_position) - num_pruned]
    chosen = kept[torch.argsort(contribution[kept], stable=True)[:number]]
    positions = torch.arange(num_pruned + 1, num_pruned + 1 + number, device=chosen.device)
    return prune_position.index_copy(0, chosen, positions)

"""The base of scores that no module sees: a job runs parts of the model again, and hands over what it has added up."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from megascore.errors import HookStateError
from megascore.hooks.base import ForwardHook

__all__ = ["MeasuredHook"]


class MeasuredHook(ForwardHook):
    """Adds up what a job measures of one layer; no forward hook of a module calls it.

    A subclass says which sums of the job it keeps (`columns`), and computes the score from them. Everything else - the
    merging over ranks, checkpoints, groups of steps, the score file - is that of all hooks.
    """

    needs_job = True
    columns: ClassVar[Mapping[str, str]] = {}
    """Of each statistic, also ``num_tokens`` and ``num_calls``, the name of the job's sum that adds to it."""

    def observe(self, inputs: Tensor, output: Tensor, token_mask: Tensor | None = None) -> None:
        """Refuse: a module's input and output do not have what is measured.

        Raises:
            HookStateError: always.
        """
        raise HookStateError(
            f"{type(self).__name__} can't be registered as a forward hook: it measures the model without a layer, or "
            "several layers together. Ask for it in a job: torchrun -m megascore score CONFIG."
        )

    def feed(self, sums: Mapping[str, Tensor]) -> None:
        """Add the sums of some micro-batches; not collective.

        Args:
            sums: By the names in `columns`, [] float64 each, of this rank's tokens.
        """
        with torch.inference_mode(False), torch.no_grad():
            for statistic, column in self.columns.items():
                accumulator = self._state[statistic]
                value = sums[column].to(accumulator.device)
                # Counts are whole numbers, which float64 holds exactly.
                accumulator += value if accumulator.is_floating_point() else value.round().to(accumulator.dtype)

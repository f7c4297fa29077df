"""The base of all hooks, as PyTorch and the published scripts call it: calls in, results and saved states out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from megascore.errors import HookStateError
from megascore.hooks import published
from megascore.hooks.accumulating import AccumulatingHook
from megascore.hooks.statistics import State, differences

__all__ = ["ForwardHook"]


class ForwardHook(AccumulatingHook):
    """Adds up statistics of a module's activations over forward passes, and turns them into importance scores.

    Register it with ``module.register_forward_hook(hook)``, or call it as PyTorch does: ``hook(module, args, output)``.

    A subclass writes what `AccumulatingHook` asks for. Comparing, saving and loading are done here, from its
    declaration of statistics.
    """

    # The published interface

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor | tuple[Tensor, ...]) -> None:
        """Add the activations of one forward pass; the signature is that of a PyTorch forward hook.

        Args:
            module: The module that ran.
            args: Its positional arguments; the first is the input, channels last.
            output: Its output, or a tuple whose first element is the output.
        """
        if not args:
            raise HookStateError(
                f"{type(self).__name__}: the module was called with keyword arguments only, and a forward hook sees "
                "positional ones; pass the input positionally."
            )
        first_output = output[0] if isinstance(output, tuple) else output
        self.observe(args[0], first_output)

    def accumulate(self) -> Tensor:
        """Return the importance scores collected so far, one per channel, head or feature.

        Raises:
            AssertionError: no activations have been collected.
            HookStateError: they were NaN or infinite, or overflowed.
        """
        return self._results()["score"]

    def to_dict(self) -> dict[str, Tensor]:
        """Return all results as CPU tensors; ``score`` is always among them.

        Raises:
            AssertionError: no activations have been collected.
        """
        return {name: value.cpu() for name, value in self._results().items()}

    def _results(self) -> dict[str, Tensor]:
        merged = self.merged_state()
        self._require_data(merged)
        results = self.compute(merged, num_calls=int(merged["num_calls"]))
        if not bool(results["score"].isfinite().all()):
            raise HookStateError(
                f"{type(self).__name__}: scores are not finite: the activations or weights that it has seen overflow, "
                "or hold NaN. Check the weights, or run the model in float32."
            )
        return {n: v.to(self._result_dtype) if v.is_floating_point() else v for n, v in results.items()}

    def state_dict(self) -> dict[str, Any]:
        """Return a copy of everything needed to go on in a fresh hook, on the CPU and in global terms.

        Holds tensors, numbers and strings only, so that ``torch.load(weights_only=True)`` reads it.
        """
        merged = {name: value.cpu() for name, value in self.merged_state().items()}
        return {
            "hook": self._score_name(),
            "settings": self.settings(),
            "num_channels": self._global_num_channels(),
            "result_dtype": str(self._result_dtype).removeprefix("torch."),
            "statistics": merged,
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over a state that `state_dict` returned.

        Raises:
            HookStateError: the state is of another class, size, schedule or other weights; every difference is
                named and nothing is changed.
        """
        differences = self._differences(state_dict)
        if differences:
            raise HookStateError(f"{type(self).__name__} cannot load this state: {'; '.join(differences)}.")
        self._result_dtype = getattr(torch, state_dict["result_dtype"])
        if state_dict["num_channels"] is None:
            self._state, self._num_channels = {}, None
        else:
            if self._num_channels is None:
                self.allocate(state_dict["num_channels"], "cpu")
            self.adopt(state_dict["statistics"])

    def get_progress_info(self) -> dict[str, Any]:
        """Return how far this hook is, as plain numbers; empty where there is nothing to tell."""
        return {}

    @classmethod
    def save_hook_states(cls, activation_hooks: Mapping[str, ForwardHook], activations_log_dir: str | Path) -> None:
        """Write ``hook_states_rank_{rank}.pth`` with every hook's `state_dict`, whole or not at all.

        Ranks are not synchronised here: the caller decides when all ranks save.
        """
        published.save_hook_states(activation_hooks, Path(activations_log_dir))

    @classmethod
    def dump_activations_logs(
        cls, activation_hooks: Mapping[str, ForwardHook], activations_log_dir: str | Path, args: Any
    ) -> None:
        """Write the final results: ``rank_{rank}.pth`` with every hook's `to_dict`, and ``args.json`` on rank 0.

        Collective over the world where torch.distributed is initialised: returns when all ranks have written.
        """
        published.dump_results(activation_hooks, Path(activations_log_dir), args)

    # Loading, in steps

    def _score_name(self) -> str:
        """Name of the score in a saved state; a parallel subclass has its parent's, for their states are the same."""
        return next(c.__name__ for c in type(self).__mro__ if not getattr(c, "takes_shards", False))

    def _global_num_channels(self) -> int | None:
        return self._num_channels

    def _differences(self, saved: Mapping[str, Any]) -> list[str]:
        """Name every reason why ``saved`` is not a state of this hook."""
        fields = ("hook", "settings", "num_channels", "result_dtype", "statistics")
        missing = [field for field in fields if field not in saved]
        if missing:
            return [f"it has no {', '.join(missing)} (found: {', '.join(map(str, saved)) or 'nothing'})"]
        own_values = {"hook": self._score_name(), **self.settings()}
        saved_values = {"hook": saved["hook"], **saved["settings"]}
        if self._num_channels is not None and saved["num_channels"] is not None:
            own_values["num_channels"] = self._global_num_channels()
            saved_values["num_channels"] = saved["num_channels"]
        differences = [
            f"{key} is {saved_values.get(key, 'missing')!r} there, {own_values.get(key, 'missing')!r} here"
            for key in {**own_values, **saved_values}
            if saved_values.get(key, "missing") != own_values.get(key, "missing")
        ]
        if differences or saved["num_channels"] is None:
            return differences
        return self.differences_from(saved["statistics"], saved["num_channels"])

    def differences_from(self, saved: State, num_channels: int) -> list[str]:
        """Name every reason why merged statistics over ``num_channels`` channels can't be this hook's; none if fit."""
        return differences(self.statistics(num_channels), saved) or self._weights_differences(saved)

    def _weights_differences(self, saved: State) -> list[str]:
        """Name the weights that are not those of ``saved``. Nothing to compare for a hook without weights."""
        return []

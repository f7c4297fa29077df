"""The base of all hooks: declared statistics in, scores out, and the bookkeeping between, written once."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from megascore.errors import HookStateError
from megascore.hooks import published
from megascore.hooks.statistics import State, Statistic, differences
from megascore.kernels import reductions

if TYPE_CHECKING:
    # In typing itself from Python 3.11 on.
    from typing_extensions import Self

__all__ = ["ForwardHook", "Method"]

COMMON_STATISTICS = (
    Statistic("num_calls", (), torch.int64, of_samples=True),
    Statistic("num_tokens", (), torch.int64),
)
"""Kept by every hook: calls that brought tokens, and tokens that counted."""


@dataclass(frozen=True)
class Method:
    """What a hook class says of itself when it is defined: the score that it computes."""

    name: str
    """In configs and score files; unique for each of the targets."""
    targets: tuple[str, ...]
    """What it can rank."""
    summary: str
    """The score of one unit, in half a sentence."""
    options: tuple[str, ...]
    """Further keys of an entry of ``scores``."""
    hook: type[ForwardHook]


class ForwardHook(ABC):
    """Adds up statistics of a module's activations over forward passes, and turns them into importance scores.

    Register it with ``module.register_forward_hook(hook)``, or call it as PyTorch does: ``hook(module, args, output)``.

    A subclass says what it keeps (`declare`), does the arithmetic of one call (`observe`) and computes scores from
    a state (`compute`). Allocation, copying, comparing, saving and loading are done here from the declaration.
    Accumulators are float64 or int64, live on the device of the activations, and never synchronise with the host.
    """

    def __init__(self) -> None:
        """Start with no data; accumulators are allocated when the number of channels and the device are known."""
        self._state: dict[str, Tensor] = {}
        self._num_channels: int | None = None
        self._result_dtype = torch.float32

    measures: ClassVar[Method | None] = None
    """The score that the class computes; None for a base of several."""

    takes_shards = False
    """Set in tensor-parallel subclasses: their layer's weight may be one shard of a larger one."""

    def __init_subclass__(
        cls,
        *,
        method: str | None = None,
        targets: tuple[str, ...] = (),
        summary: str = "",
        options: tuple[str, ...] = (),
        **others: Any,
    ) -> None:
        """Make a class that names a method one of the scores that can be asked for.

        Args:
            method: Name of the score.
            targets: What it can rank; see `megascore.sites.targets`.
            summary: The score of one unit, in half a sentence.
            options: Further keys of an entry of ``scores``, which `check_options` checks and `at` is given.
            others: Of other base classes.
        """
        super().__init_subclass__(**others)
        if method is not None:
            if not targets or not summary:
                raise TypeError(
                    f"{cls.__name__} names its method '{method}', and must say its targets and summary too."
                )
            cls.measures = Method(method, targets, summary, options, cls)

    @classmethod
    def at(cls, module: nn.Module, num_units: int, options: Mapping[str, Any]) -> Self:
        """Return a hook for a module of a model; a subclass that needs more than its own calls overrides it.

        Args:
            module: Has the weight of the channels that are scored, where there is one.
            num_units: Channels (heads, experts) of this rank at the place.
            options: Those of an entry of ``scores``, checked.
        """
        return cls()

    @classmethod
    def check_options(cls, options: Mapping[str, Any]) -> None:
        """Refuse values of the class's own options; those that are not its own never come here.

        Raises:
            ConfigError: naming the option, what came and what was expected.
        """
        return

    @classmethod
    def num_steps(cls, options: Mapping[str, Any]) -> int | None:
        """Return how many steps a run must have; None where any number will do."""
        return None

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

    def _require_data(self, state: State) -> None:
        # AssertionError is the published interface's documented type for this mistake of a user.
        # Tokens beside calls: the first of the ranks that share the samples counts calls, and a mask may leave it none.
        if not state or not int(state["num_calls"] + state["num_tokens"]):
            raise AssertionError(f"{type(self).__name__}: no activations collected yet; run a forward pass first.")

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

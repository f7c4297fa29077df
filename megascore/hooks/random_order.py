"""RandomHook: an order that knows nothing, as the floor under all others."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from megascore.errors import ConfigError
from megascore.hooks.base import ForwardHook
from megascore.hooks.statistics import Merge, State, Statistic
from megascore.kernels.exact import exact

__all__ = ["RandomHook"]

SEED = 1234


class RandomHook(
    ForwardHook,
    method="random",
    targets=(
        "ffn",
        "attention_heads",
        "kv_heads",
        "hidden_size",
        "layers",
        "experts",
        "expert_ffn",
        "shared_expert_ffn",
    ),
    summary="a number between 0 and 1 of a generator that the seed and the module's name start",
    options=("seed",),
):
    """Scores channels at random, the same in every layout. It counts tokens, and looks at nothing else."""

    reads_activations = False

    def __init__(self, seed: int = SEED) -> None:
        """Start with no data; numbers are drawn when the number of channels is known."""
        super().__init__()
        self._seed = seed

    @classmethod
    def check_options(cls, options: Mapping[str, Any]) -> None:
        """Refuse a seed that is no whole number."""
        seed = options.get("seed", SEED)
        if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
            raise ConfigError(f"seed of method 'random' is {seed!r}: expected a whole number of at least 0.")

    @classmethod
    def at(cls, module: Any, num_units: int, options: Mapping[str, Any]) -> RandomHook:
        """Return a hook with the seed of the options."""
        return cls(int(options.get("seed", SEED)))

    def settings(self) -> dict[str, Any]:
        """Return the seed."""
        return {"seed": self._seed}

    def declare(self, num_channels: int) -> tuple[Statistic, ...]:
        """Return the numbers, which are the score."""
        return (Statistic("drawn", (num_channels,), merge=Merge.REPLICATED, channel_dim=0),)

    def allocate(self, num_channels: int, device: torch.device | str) -> None:
        """Allocate as every hook does, and draw numbers for all channels of the place, of which this rank has some."""
        fresh = not self._state
        super().allocate(num_channels, device)
        if fresh:
            text = f"{self._seed}/{self.place_name}"
            seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1
            generator = torch.Generator().manual_seed(seed)
            whole = torch.rand(self._global_num_channels() or num_channels, generator=generator, dtype=torch.float64)
            [drawn] = self.declare(num_channels)
            self._state["drawn"].copy_(self._local_part(drawn, whole))

    @exact
    def observe(self, inputs: Tensor, output: Tensor, token_mask: Tensor | None = None) -> None:
        """Count the tokens of a call. Not collective."""
        # Of routed experts the input is which expert each token went to.
        self._begin_call(inputs if inputs.is_floating_point() else output, token_mask, self.num_channels)

    @classmethod
    def compute(cls, state: State, *, num_calls: float = 1.0) -> dict[str, Tensor]:
        """Return ``score`` [C]."""
        cls._require_data(state)
        return {"score": state["drawn"]}

"""IndependentKvHeadContributionHook: what each KV head's query heads add to the attention output."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from megascore.errors import HookStateError
from megascore.hooks.statistics import State, Statistic
from megascore.hooks.weights import WeightHook, weight_matrix
from megascore.kernels import reductions
from megascore.kernels.exact import exact
from megascore.kernels.products import product

if TYPE_CHECKING:
    # In typing itself from Python 3.11 on.
    from typing_extensions import Self

__all__ = ["IndependentKvHeadContributionHook"]

OPTIMIZE_FOR = ("latency", "memory")
CHUNK_BYTES = 1 << 23
"""Extra memory of a call. Products want many tokens at once, and its result is read back while still in a cache."""

NUM_BLOCKS = 4
"""Blocks of rows of a triangular factor: 4 skip 3/8 of the products with zeros, of the 1/2 that there are."""
MIN_BLOCK_ROWS = 64


class IndependentKvHeadContributionHook(
    WeightHook,
    method="independent_contribution",
    targets=("kv_heads",),
    summary="mean norm of what the KV head's query heads add to the output",
):
    """Scores KV heads: ``mean over tokens of norm2(W_g x_g)``, x_g and W_g being the slices of head g's query heads.

    Only the norm of ``W_g x_g`` is needed, so the hook multiplies by the triangular factor R_g of ``W_g = Q_g R_g``
    (width x width instead of outputs x width) and skips its zeros: exact, and a fraction of the arithmetic.
    """

    def __init__(self, linear_layer: nn.Module, activation_hooks_kwargs: Mapping[str, Any]) -> None:
        """Factorize the weight, KV head by KV head.

        Args:
            linear_layer: The attention output projection, with a ``weight`` [E, num_query_heads * head_dim].
            activation_hooks_kwargs: ``model`` with a ``config``, and ``block_config`` with
                ``attention.num_key_value_heads``; ``optimize_for``, "latency" or "memory", gives the same here.

        Raises:
            HookStateError: something is missing, or the numbers don't fit the weight.
        """
        optimize_for = activation_hooks_kwargs.get("optimize_for", "memory")
        if optimize_for not in OPTIMIZE_FOR:
            raise HookStateError(f"optimize_for must be one of {', '.join(OPTIMIZE_FOR)}; got {optimize_for!r}.")
        self._build(linear_layer, _num_kv_heads(linear_layer, activation_hooks_kwargs))

    @classmethod
    def at(cls, module: nn.Module, num_units: int, options: Mapping[str, Any]) -> Self:
        """Return a hook for a projection whose input is ``num_units`` equal slices."""
        return cls.for_heads(module, num_units)

    @classmethod
    def for_heads(cls, linear_layer: nn.Module, num_kv_heads: int) -> Self:
        """Return a hook for a projection whose input is ``num_kv_heads`` equal slices, one for each KV head.

        Args:
            linear_layer: The attention output projection.
            num_kv_heads: KV heads (of this rank's part, where the layer is tensor-parallel).
        """
        hook = cls.__new__(cls)
        hook._build(linear_layer, num_kv_heads)
        return hook

    def _build(self, linear_layer: nn.Module, num_kv_heads: int) -> None:
        weight = weight_matrix(linear_layer, self._score_name(), may_be_shard=self.takes_shards).detach()
        if num_kv_heads < 1 or weight.shape[1] % num_kv_heads:
            raise HookStateError(
                f"{self._score_name()}: {weight.shape[1]} inputs of the projection can't be shared by "
                f"{num_kv_heads} KV heads equally."
            )
        self._group_width = weight.shape[1] // num_kv_heads
        norms = reductions.column_norms(weight).view(num_kv_heads, -1)
        super().__init__(torch.linalg.vector_norm(norms, dim=-1))
        self._factors = _triangular_factors(weight, num_kv_heads)

    def settings(self) -> dict[str, Any]:
        """Return the width of a KV head's slice."""
        return {"inputs of a KV head": self._group_width}

    def declare(self, num_channels: int) -> tuple[Statistic, ...]:
        """Return the sum of norms, and the norms of the heads' weights; a channel is a KV head."""
        return (*super().declare(num_channels), Statistic("sum_of_norms", (num_channels,), channel_dim=0))

    def kept(self) -> tuple[Tensor, ...]:
        """Return the statistics, and what is made of the weights."""
        return (*super().kept(), self._factors)

    @exact
    def observe(self, inputs: Tensor, output: Tensor, token_mask: Tensor | None = None) -> None:
        """Add one call; ``inputs`` is [..., num_kv_heads * width], the projection's input. Not collective."""
        num_kv_heads, width = len(self._factors), self._group_width
        if inputs.shape[-1] != num_kv_heads * width:
            raise HookStateError(
                f"{type(self).__name__} expects {num_kv_heads} x {width} inputs for each token, "
                f"got the shape {list(inputs.shape)}."
            )
        self._begin_call(inputs, token_mask, num_kv_heads)
        self._factors = self._factors.to(inputs.device)
        for (x,), mask in reductions.token_views([inputs], token_mask):
            self._observe_tokens(x, mask)

    @classmethod
    def compute(cls, state: State, *, num_calls: float = 1.0) -> dict[str, Tensor]:
        """Return ``score`` [num_kv_heads], the mean times ``num_calls``."""
        cls._require_data(state)
        return {"score": state["sum_of_norms"] / state["num_tokens"] * num_calls}

    def _observe_tokens(self, x: Tensor, mask: Tensor | None) -> None:
        dtype = reductions.accumulation_dtype(x.dtype)
        # The slice, both halves of its product, and room for a library's own copies.
        step = max(1, reductions.bound(CHUNK_BYTES, x.device) // (6 * self._group_width * dtype.itemsize))
        for start in range(0, len(x), step):
            tokens = x[start : start + step].view(-1, len(self._factors), self._group_width)
            norms = torch.stack([self._norms(tokens[:, head], head) for head in range(tokens.shape[1])], dim=-1)
            if mask is not None:
                norms.masked_fill_(~mask[start : start + step, None], 0)
            self._state["sum_of_norms"] += norms.sum(0, dtype=torch.float64)

    def _norms(self, x: Tensor, head: int) -> Tensor:
        """Return norm2(W_g x_g) of each token: ``x`` is [T, width], the result [T]."""
        factor = self._factors[head]
        if x.device.type == "cpu":
            # Blocks are too small to gain from products of bfloat16 there, and each would convert its part again.
            x = x.to(torch.promote_types(x.dtype, factor.dtype))
        step = max(MIN_BLOCK_ROWS, -(-len(factor) // NUM_BLOCKS))
        squares = [
            torch.linalg.vector_norm(product(x[:, row:], factor[row : row + step, row:].mT), dim=-1).square_()
            for row in range(0, len(factor), step)
        ]
        return torch.stack(squares).sum(0).sqrt_()


def _triangular_factors(weight: Tensor, num_kv_heads: int) -> Tensor:
    """Return R_g of each KV head's slice of ``weight`` [E, C]: [num_kv_heads, min(E, width), width]."""
    dtype = reductions.accumulation_dtype(weight.dtype)
    slices = weight.chunk(num_kv_heads, dim=1)
    return torch.stack([torch.linalg.qr(part.to(dtype), mode="r").R for part in slices])


def _num_kv_heads(linear_layer: nn.Module, activation_hooks_kwargs: Mapping[str, Any]) -> int:
    """Read the number of KV heads from the configs that the published hook takes, and check it against the weight."""
    try:
        config = activation_hooks_kwargs["model"].config
        num_kv_heads = int(activation_hooks_kwargs["block_config"].attention.num_key_value_heads)
        num_heads = int(config.num_attention_heads)
        head_dim = int(getattr(config, "head_dim", None) or config.hidden_size // num_heads)
    except (KeyError, AttributeError, TypeError) as error:
        raise HookStateError(
            "activation_hooks_kwargs must hold 'model' with .config (num_attention_heads, head_dim or hidden_size) and "
            f"'block_config' with .attention.num_key_value_heads; {type(error).__name__}: {error}. "
            "IndependentKvHeadContributionHook.for_heads takes the number itself."
        ) from error
    num_inputs = int(linear_layer.weight.shape[1]) if isinstance(linear_layer.weight, Tensor) else 0
    if num_heads * head_dim != num_inputs or num_heads % num_kv_heads:
        raise HookStateError(
            f"the config has {num_heads} query heads of {head_dim} and {num_kv_heads} KV heads, "
            f"but the projection has {num_inputs} inputs."
        )
    return num_kv_heads

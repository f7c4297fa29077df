"""The base of hooks that read a module's weights: finding the weight, and knowing it again in a saved state."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from megascore.errors import HookStateError
from megascore.hooks.base import ForwardHook
from megascore.hooks.statistics import Merge, State, Statistic

if TYPE_CHECKING:
    # In typing itself from Python 3.11 on.
    from typing_extensions import Self

__all__ = ["WeightHook", "output_bias", "weight_matrix", "whole_weight"]

RETURNS_BIAS_BESIDE = ("skip_bias_add", "te_return_bias")
"""Attributes of layers (of Megatron-Core, of Transformer Engine in it) whose bias is not in their output."""

ADAPTERS = ("lora_A", "lora_embedding_A", "adapter")
"""Children with which layers of peft, Megatron-Bridge and NeMo add to what the weight of another child gives."""

WEIGHT_TOLERANCE = 1e-5
"""Relative difference up to which norms are those of the same weights; rounding of another device makes less."""


class WeightHook(ForwardHook):
    """A hook whose score depends on weights: their norms are in its state, and a state of other weights is refused."""

    def __init__(self, weight_norm: Tensor | None) -> None:
        """Allocate the accumulators, on the device of the weights.

        Args:
            weight_norm: [num_channels] norm of the weights that belong to each channel; None for a score without any.
        """
        super().__init__()
        self._weight_norm = None if weight_norm is None else weight_norm.double()
        if weight_norm is not None:
            self.allocate(len(weight_norm), weight_norm.device)

    @classmethod
    def at(cls, module: nn.Module, num_units: int, options: Mapping[str, Any]) -> Self:
        """Return a hook for a layer, which is the first argument of the constructors of subclasses."""
        layer: Any = module
        return cls(layer)

    def declare(self, num_channels: int) -> tuple[Statistic, ...]:
        """Return the statistic of the weights, where there are any; subclasses add their own."""
        if self._weight_norm is None:
            return ()
        return (Statistic("weight_norm", (num_channels,), merge=Merge.REPLICATED, channel_dim=0),)

    def kept(self) -> tuple[Tensor, ...]:
        """Return the statistics, and the norms of the weights as they are here."""
        return super().kept() if self._weight_norm is None else (*super().kept(), self._weight_norm)

    def allocate(self, num_channels: int, device: torch.device | str) -> None:
        """Allocate as every hook does; the norms of the weights are there from the start."""
        fresh = not self._state
        super().allocate(num_channels, device)
        if fresh and self._weight_norm is not None:
            self._state["weight_norm"].copy_(self._weight_norm)

    def _weights_differences(self, saved: State) -> list[str]:
        if self._weight_norm is None:
            return []
        statistic = next(s for s in self.declare(len(saved["weight_norm"])) if s.name == "weight_norm")
        theirs = self._local_part(statistic, saved["weight_norm"]).to(self._weight_norm.device)
        other = ~torch.isclose(theirs, self._weight_norm, rtol=WEIGHT_TOLERANCE, atol=0)
        if not other.any():
            return []
        first = int(other.nonzero()[0])
        return [
            f"weights differ in {int(other.sum())} of {len(other)} channels (channel {first}: norm "
            f"{float(theirs[first]):.6g} there, {float(self._weight_norm[first]):.6g} here)"
        ]


def weight_matrix(layer: nn.Module, hook_name: str, *, may_be_shard: bool = False) -> Tensor:
    """Return the weight [E, C] of a linear layer.

    Args:
        layer: nn.Linear, or a layer like Megatron's with ``weight`` [output, input] and ``input_size``.
        hook_name: For the error.
        may_be_shard: Allow a weight with fewer columns than ``input_size``, as tensor-parallel layers have.

    Raises:
        HookStateError: there is no such weight, it is one shard of a larger one, or an adapter is added to it.
    """
    _refuse_adapters(layer, hook_name)
    weight = getattr(layer, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 2:
        found = f"a weight of shape {list(weight.shape)}" if isinstance(weight, Tensor) else "no weight"
        raise HookStateError(f"{hook_name} takes a linear layer with a weight [output, input]; {layer} has {found}.")
    num_columns = int(getattr(layer, "input_size", getattr(layer, "in_features", weight.shape[1])))
    if num_columns != weight.shape[1] and not may_be_shard:
        raise HookStateError(
            f"{hook_name}: the layer has {num_columns} inputs but its weight has the shape {list(weight.shape)}. "
            f"If it is tensor-parallel, use Megatron{hook_name} of megascore.mcore."
        )
    return whole_weight(weight)


def whole_weight(weight: Tensor) -> Tensor:
    """Return a weight that is sharded between forward passes (FSDP, a DTensor) as one tensor, others as they are.

    One that is kept in fewer bits (Transformer Engine's tensors in fp8, say, which have no views) is returned as the
    numbers that it stands for. Collective over the ranks that hold its shards.
    """
    full_tensor = getattr(weight, "full_tensor", None)
    whole = weight if full_tensor is None else cast(Tensor, full_tensor())
    # Subclasses of tensors that are quantized have a method of their own, every other tensor has PyTorch's.
    is_quantized = type(whole).dequantize is not Tensor.dequantize
    return whole.detach().dequantize() if is_quantized else whole


def output_bias(layer: nn.Module) -> Tensor | None:
    """Return the bias that a linear layer's output contains; None if there is none, or the layer returns it beside."""
    bias = getattr(layer, "bias", None)
    returned_beside = any(getattr(layer, name, False) for name in RETURNS_BIAS_BESIDE)
    if not isinstance(bias, Tensor) or bias.numel() == 0 or returned_beside:
        return None
    return bias.detach()


def _refuse_adapters(layer: nn.Module, hook_name: str) -> None:
    children = dict(layer.named_children())
    found = [name for name in ADAPTERS if name in children]
    # peft keeps adapters that are added into the weight; `merged` says so.
    if found and getattr(layer, "merged", False) is not True:
        raise HookStateError(
            f"{hook_name}: {type(layer).__name__} has an adapter ({found[0]}) beside its weight, which the score would "
            "leave out. Merge it first: model.merge_and_unload() in peft, the merge script in Megatron-Bridge and NeMo."
        )

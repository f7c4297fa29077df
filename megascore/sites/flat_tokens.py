"""Modules that are given the tokens of all samples in one row, such as shared experts: which sample each is of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from megascore.errors import ModelError
from megascore.sites.places import first_tensor

__all__ = ["FlatTokens"]


class FlatTokens:
    """Reads what a module inside of a layer is given as [B * S, C], in the shape of the layer's own input [B, S, H]."""

    def __init__(self, name: str, layer: nn.Module) -> None:
        """Read a module of this name inside of a layer."""
        self._name = name
        self._layer = layer
        self._shape: tuple[int, ...] = ()

    def follow(self, current_mask: Callable[[], Tensor | None]) -> RemovableHandle:
        """See the input of the layer before each of its forward passes, until the handle is removed."""

        def see(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden = args[0] if args else kwargs["hidden_states"]
            self._shape = tuple(hidden.shape[:2])

        return self._layer.register_forward_pre_hook(see, with_kwargs=True)

    def read(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> tuple[Tensor, Tensor]:
        """Return input and output of the module as views [S, B, C].

        Raises:
            ModelError: it was given other tokens than those of the layer.
        """
        inputs: Tensor = args[0] if args else next(iter(kwargs.values()))
        return self._sequence_first(inputs), self._sequence_first(first_tensor(output))

    def _sequence_first(self, tensor: Tensor) -> Tensor:
        num_tokens = tensor.numel() // tensor.shape[-1]
        if len(self._shape) != 2 or num_tokens != self._shape[0] * self._shape[1]:
            raise ModelError(
                f"{self._name} was given {num_tokens} tokens, and the layer around it a batch of {list(self._shape)}: "
                "which sample each is of can't be told. Leave shared_expert_ffn out of the scores."
            )
        return tensor.reshape(*self._shape, -1).transpose(0, 1)

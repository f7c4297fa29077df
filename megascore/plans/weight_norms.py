"""Orders by the norm of the weights of each unit: what can be known without running the model."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from megascore.plans.orders import Unit
from megascore.plans.parent import Parent
from megascore.weights.huggingface.dims import Dim
from megascore.weights.huggingface.sources import all_tensors
from megascore.weights.huggingface.tensors import Source

__all__ = ["WeightNormOrders"]

DIM_OF: dict[str, tuple[Dim, ...]] = {
    "hidden_size": ("hidden",),
    "ffn": ("ffn",),
    "attention_heads": ("query",),
    "kv_heads": ("key_value",),
    "expert_ffn": ("expert_ffn", "expert_ffn_twice"),
}


class WeightNormOrders:
    """L2 norm over all weights that would go with a unit: rows and columns of every tensor that has it.

    The folder is read once, tensor by tensor, when something is asked first.
    """

    def __init__(self, parent: Parent) -> None:
        """Keep the model."""
        self._parent = parent
        self._squares: dict[Unit, Tensor] | None = None

    def values(self, target: str, layer: int | None, expert: int | None, size: int) -> Tensor:
        """See `megascore.plans.orders.Orders`."""
        if self._squares is None:
            self._squares = self._read()
        return self._squares[target, layer, expert].view(size, -1).sum(1).sqrt()

    def _read(self) -> dict[Unit, Tensor]:
        squares: dict[Unit, Tensor] = {}
        num_layers = self._parent.config.architecture.num_layers

        def add(unit: Unit, values: Tensor) -> None:
            squares[unit] = squares[unit] + values if unit in squares else values

        with self._parent.checkpoint.folder.reading() as read:
            for source in all_tensors(self._parent.config).values():
                values = read(source.name).double().square()
                for unit, summed in _of_tensor(source, values):
                    add(unit, summed)
                if source.layer is not None:
                    whole = torch.zeros(num_layers, dtype=torch.float64)
                    whole[source.layer] = values.sum()
                    add(("layers", None, None), whole)
        for unit in [unit for unit in squares if unit[0] == "one_expert"]:
            _, layer, expert = unit
            together = squares["experts", layer, None]
            together[expert] += squares.pop(unit).sum()
        return squares


def _of_tensor(source: Source, values: Tensor) -> Iterator[tuple[Unit, Tensor]]:
    """Yield what a tensor of squares adds to each unit that has a part of it."""
    dims = source.dims
    for position, dim in enumerate(dims):
        others = [other for other in range(len(dims)) if other != position]
        summed = values.sum(others) if others else values
        if dim == "hidden":
            yield ("hidden_size", None, None), summed
        elif dim == "experts":
            yield ("experts", source.layer, None), summed
        for target in ("ffn", "attention_heads", "kv_heads"):
            if dim in DIM_OF[target]:
                yield (target, source.layer, None), summed
    if source.expert is not None:
        yield ("one_expert", source.layer, source.expert), values.sum().view(1)
    for expert in range(len(values)) if dims[0] == "experts" and len(dims) == 3 else ():
        yield from _inside(source, dims[1:], values[expert], expert)
    if source.expert is not None:
        yield from _inside(source, dims, values, source.expert)


def _inside(source: Source, dims: tuple[Dim, ...], values: Tensor, expert: int) -> Iterator[tuple[Unit, Tensor]]:
    for position, dim in enumerate(dims):
        if dim in DIM_OF["expert_ffn"]:
            summed = values.sum(1 - position)
            # Of gate and up projection, one behind the other.
            halves = summed.view(2, -1).sum(0) if dim == "expert_ffn_twice" else summed
            yield ("expert_ffn", source.layer, expert), halves

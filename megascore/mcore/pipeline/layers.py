"""The place of each layer of the model: the order in which a run goes through them, the same on every rank."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron.core import parallel_state
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import nn

from megascore.errors import ModelError
from megascore.parallel.comm import agree, gather_objects

__all__ = ["LayerOrder", "is_transformer_layer", "layer_numbers", "layers_in_order", "layers_of", "order_of_layers"]

ADVICE = "Score it in a full pass (run.blockwise=false)"


@dataclass(frozen=True)
class LayerOrder:
    """The chunks of the pipeline in the order in which samples go through them, and the layers in each."""

    layers_of_chunk: Sequence[Sequence[int]]
    """Global layer numbers, by chunk; consecutive."""
    own: Mapping[int, nn.Module]
    """The chunks of this rank by their number in the pipeline."""

    @property
    def num_layers(self) -> int:
        """Layers of the whole model."""
        return sum(len(layers) for layers in self.layers_of_chunk)

    def place_of(self, layer: int) -> tuple[int, int]:
        """Return the chunk of a layer, and its position there."""
        for chunk, layers in enumerate(self.layers_of_chunk):
            if layer in layers:
                return chunk, layers.index(layer)
        raise AssertionError(f"layer {layer} of {self.num_layers}")

    def own_layer(self, layer: int) -> nn.Module | None:
        """Return a layer, where this rank has it."""
        chunk, position = self.place_of(layer)
        return layers_of(self.own[chunk])[position] if chunk in self.own else None


def order_of_layers(chunks: Sequence[nn.Module]) -> LayerOrder:
    """Find out which layers every rank has. Collective over the world.

    Raises:
        ModelError: layers of the model can't be run one at a time, or a pipeline chunk has none.
    """
    own = agree("looking for the layers", lambda: _own_chunks(chunks))
    return LayerOrder(layers_in_order(gather_objects(_numbers_of(own))), own)


def layer_numbers(chunks: Sequence[nn.Module]) -> dict[int, list[int]]:
    """Return the numbers of this rank's layers, by the number of their chunk in the pipeline. Not collective.

    Raises:
        ModelError: layers of the model can't be run one at a time.
    """
    return _numbers_of(_own_chunks(chunks))


def layers_in_order(found: Iterable[Mapping[int, list[int]]]) -> list[list[int]]:
    """Return the layers of each chunk of the pipeline, from what `layer_numbers` gave on all ranks. Not collective.

    Raises:
        ModelError: a chunk has none, or layers are missing or out of order.
    """
    everywhere: dict[int, list[int]] = {}
    for numbers in found:
        everywhere.update(numbers)
    layers_of_chunk = [everywhere[chunk] for chunk in sorted(everywhere)]
    flat = [layer for layers in layers_of_chunk for layer in layers]
    if flat != list(range(len(flat))) or not all(layers_of_chunk):
        raise ModelError(
            f"run.blockwise: the chunks of the pipeline have the layers {layers_of_chunk}: expected all layers in "
            f"order, and at least one in each chunk. {ADVICE}, or choose another parallel.pipeline_layers."
        )
    return layers_of_chunk


def layers_of(chunk: nn.Module) -> Sequence[Any]:
    """Return the decoder layers of a chunk.

    Raises:
        ModelError: it has no decoder, or several.
    """
    blocks = [module for module in chunk.modules() if isinstance(module, TransformerBlock)]
    if len(blocks) != 1:
        raise ModelError(f"{type(chunk).__name__} has {len(blocks)} transformer blocks, expected one. {ADVICE}.")
    return list(blocks[0].layers)


def _numbers_of(own: Mapping[int, nn.Module]) -> dict[int, list[int]]:
    return {chunk: [layer.layer_number - 1 for layer in layers_of(module)] for chunk, module in own.items()}


def _own_chunks(chunks: Sequence[nn.Module]) -> dict[int, nn.Module]:
    num_stages: int = parallel_state.get_pipeline_model_parallel_world_size()
    stage: int = parallel_state.get_pipeline_model_parallel_rank()
    for chunk in chunks:
        for layer in layers_of(chunk):
            _check_runs_alone(layer)
    return {number * num_stages + stage: chunk for number, chunk in enumerate(chunks)}


def _check_runs_alone(layer: Any) -> None:
    """Refuse what Megatron does around a layer and not in it."""
    config = layer.config
    for key in ("fp8", "fp4", "mtp_num_layers", "cpu_offloading"):
        if getattr(config, key, None):
            raise ModelError(f"run.blockwise: the model has {key}={getattr(config, key)} in its config. {ADVICE}.")


def is_transformer_layer(layer: nn.Module) -> bool:
    """Tell whether a layer is one of Megatron's ordinary ones."""
    return isinstance(layer, TransformerLayer)

"""A Megatron-Core model as scoring sees it: its modules under global names, with the roles of the parallel axes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor, nn

from megascore.errors import ModelError
from megascore.mcore.compat import replays_graphs, runs_fused
from megascore.mcore.sites.experts import expert_facts, expert_layout, expert_places
from megascore.mcore.sites.fused_norm import fused_norm_output, norm_module
from megascore.mcore.sites.heads import megatron_heads
from megascore.mcore.sites.inventory import decoder_of, unknown_in_layer, unknown_outside
from megascore.mcore.sites.kv_heads import KvHeads
from megascore.mcore.sites.masks import SequenceMask
from megascore.mcore.sites.norms import norms_of_layer
from megascore.mcore.sites.placement import own_columns, place_hidden_states, place_row_parallel_input
from megascore.mcore.world.groups import DenseGroups
from megascore.parallel.axes import Placement
from megascore.sites.inventory import joined
from megascore.sites.places import Place, Reader, first_tensor
from megascore.sites.targets import PlaceKind

__all__ = ["MegatronModelView"]

RUN_PAST = (
    "the model runs past this module, in fused operations of Transformer Engine. Build it with "
    "use_transformer_engine_op_fuser=False (and use_grouped_gemm_for_shared_expert=False), or leave {target} out of "
    "the scores."
)


class MegatronModelView:
    """The decoder of a Megatron-Core model: all its chunks on this rank, wrapped or not.

    A rank whose part of the model has no decoder layers has no places, and takes part all the same.
    """

    def __init__(self, chunks: Sequence[nn.Module]) -> None:
        """Find the decoder blocks and the process groups they were built with."""
        self.modules = tuple(chunks)
        self._chunks = [(str(number) if len(chunks) > 1 else "", chunk) for number, chunk in enumerate(chunks)]
        self._blocks = [
            (joined(chunk_name, name), block) for chunk_name, chunk in self._chunks for name, block in decoder_of(chunk)
        ]
        blocks = [block for _, block in self._blocks]
        parts = blocks or [module for chunk in chunks for module in chunk.modules()]
        built = next((part for part in parts if isinstance(getattr(part, "config", None), TransformerConfig)), None)
        if built is None:
            names = ", ".join(type(chunk).__name__ for chunk in chunks)
            raise ModelError(f"{names}: no module was built with a Megatron-Core TransformerConfig.")
        self._config: TransformerConfig = built.config
        self._never_called = {
            id(part)
            for block in blocks
            for owner in block.modules()
            if runs_fused(owner)
            for part in owner.modules()
            if part is not owner
        }
        self._groups = DenseGroups.of(built)
        context = self._groups.axis("cp")
        self._mask = SequenceMask(context)
        """Of the inputs of row-parallel linear layers, which have what context parallelism leaves of a sequence."""
        self._mask_of_hidden_states = SequenceMask(
            context, self._groups.axis("tp") if self._sequence_parallel else None
        )

    @property
    def facts(self) -> Mapping[str, Any]:
        """Sizes of the model, from its TransformerConfig."""
        config = self._config
        return {
            "num_layers": config.num_layers,
            "hidden_size": config.hidden_size,
            "num_attention_heads": config.num_attention_heads,
            # With multi-latent attention each head has keys and values of its own.
            "num_kv_heads": (
                config.num_attention_heads if isinstance(config, MLATransformerConfig) else config.num_query_groups
            ),
            "head_dim": config.v_head_dim if isinstance(config, MLATransformerConfig) else config.kv_channels,
            "ffn_hidden_size": config.ffn_hidden_size,
            **expert_facts(config),
        }

    @cached_property
    def unknown(self) -> Sequence[str]:
        """Modules on this rank with channels, heads or experts, that are neither scored nor known to be elsewhere."""
        found: list[str] = []
        for path, block in self._blocks:
            for position, layer in enumerate(block.layers):
                name = f"decoder.layers.{(getattr(layer, 'layer_number', None) or position + 1) - 1}"
                prefix = f"{joined(path, 'layers')}.{position}."
                places = [place for place in self.places if place.local_name.startswith(prefix)]
                found += unknown_in_layer(name, layer, places, prefix, self._config.hidden_size)
        return found + [name for chunk_name, chunk in self._chunks for name in unknown_outside(chunk_name, chunk)]

    @property
    def layout(self) -> Mapping[str, Any]:
        """Degrees of the parallel axes; those of experts where there are some."""
        names = {"tensor": "tp", "pipeline": "pp", "context": "cp", "data": "dp"}
        return {
            **{name: self._groups.axis(axis).size for name, axis in names.items()},
            "sequence": self._sequence_parallel,
            "virtual_pipeline": len(self.modules),
            **expert_layout(self._config),
        }

    @cached_property
    def places(self) -> Sequence[Place]:
        """All scorable modules on this rank."""
        return tuple(
            replace(place, obstacle=RUN_PAST) if id(place.module) in self._never_called else place
            for place in self._find_places()
        )

    @property
    def _sequence_parallel(self) -> bool:
        return bool(self._config.sequence_parallel) and self._groups.axis("tp").size > 1

    def _find_places(self) -> Iterator[Place]:
        if replays_graphs(self._config):
            raise ModelError(
                "this process has captured CUDA graphs of the model's layers (cuda_graph_impl='local'), and hooks in "
                "them are not called: score in a process that has captured none, or with cuda_graph_impl='none'."
            )
        for path, block in self._blocks:
            for position, layer in enumerate(block.layers):
                if isinstance(layer, TransformerLayer):
                    yield from self._places_of_layer(layer, f"{joined(path, 'layers')}.{position}")
            if getattr(block, "final_layernorm", None) is not None:
                local_name = joined(path, "final_layernorm")
                yield self._norm("decoder.final_layernorm", block.final_layernorm, local_name, _read_norm)

    def _places_of_layer(self, layer: TransformerLayer, path: str) -> Iterator[Place]:
        # layer_number counts from 1 over all (virtual) pipeline stages, whatever the position in this rank's list.
        name = f"decoder.layers.{layer.layer_number - 1}"
        yield self._hidden_states(PlaceKind.LAYER, name, layer, path, 1, _read_layer)
        if hasattr(layer.self_attention, "linear_proj"):
            yield from self._attention(name, layer, path)
        if isinstance(layer.mlp, MLP):
            yield self._linear(PlaceKind.FFN_PROJECTION, name, layer, path, "mlp.linear_fc2")
        if isinstance(layer.mlp, MoELayer):
            masks = self._mask_of_hidden_states
            yield from expert_places(layer.mlp, f"{name}.mlp", f"{path}.mlp", self._groups, masks)
            if layer.mlp.shared_experts is not None:
                yield self._linear(
                    PlaceKind.SHARED_EXPERT_PROJECTION,
                    name,
                    layer,
                    path,
                    "mlp.shared_experts.linear_fc2",
                    communicates=not layer.mlp.shared_expert_overlap,
                )
        for norm in norms_of_layer(layer, self._config.hidden_size)[0]:
            read = _fused_norm_reader(norm.module) if norm.is_fused else _read_norm
            yield self._norm(f"{name}.{norm.name}", norm.module, f"{path}.{norm.path}", read)

    def _attention(self, name: str, layer: TransformerLayer, path: str) -> Iterator[Place]:
        linear = "self_attention.linear_proj"
        place = self._linear(PlaceKind.ATTENTION_PROJECTION, name, layer, path, linear)
        total, tensor_size = place.placement.shard.total, self._groups.axis("tp").size
        heads = megatron_heads(place.name, layer.self_attention, self._config, total, tensor_size)
        yield replace(place, num_heads=heads.num_heads, num_competing_groups=heads.num_kv_heads)
        if heads.num_kv_heads is not None:
            own = KvHeads(place.module, heads.num_kv_heads, self._groups)
            yield replace(
                place,
                kind=PlaceKind.KV_HEADS,
                placement=own.placement,
                read=_linear_reader(own.own),
                scored_module=own.module,
            )

    def _linear(
        self, kind: PlaceKind, name: str, layer: nn.Module, path: str, linear: str, *, communicates: bool = True
    ) -> Place:
        module = layer.get_submodule(linear)
        placement = place_row_parallel_input(module, self._groups, communicates=communicates)
        # A layer with input_is_parallel=False is given all channels, of which its own count.
        read = _linear_reader(lambda inputs: own_columns(inputs, placement.shard))
        return self._place(kind, f"{name}.{linear}", module, f"{path}.{linear}", placement, read, self._mask)

    def _norm(self, name: str, module: nn.Module, path: str, read: Reader) -> Place:
        place = self._hidden_states(PlaceKind.NORM, name, module, path, self._config.hidden_size, read)
        return replace(place, scored_module=lambda: norm_module(module))

    def _hidden_states(
        self, kind: PlaceKind, name: str, module: nn.Module, path: str, num_channels: int, read: Reader
    ) -> Place:
        placement = place_hidden_states(num_channels, self._sequence_parallel, self._groups)
        return self._place(kind, name, module, path, placement, read, self._mask_of_hidden_states)

    def _place(
        self,
        kind: PlaceKind,
        name: str,
        module: nn.Module,
        path: str,
        placement: Placement,
        read: Reader,
        mask: SequenceMask,
    ) -> Place:
        groups = self._groups.larger_than_one("tp", "cp", "dp")
        return Place(kind, name, module, path, placement, read, local_mask=mask, groups=groups)


def _linear_reader(own: Callable[[Tensor], Tensor]) -> Reader:
    """Return a reader of this rank's part of the input, and of the output (without a bias that is returned beside)."""

    def read(args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> tuple[Tensor, Tensor]:
        return own(args[0]), first_tensor(output)

    return read


def _read_norm(args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> tuple[Tensor, Tensor]:
    """Return the output of a norm twice: it is what is scored there."""
    return first_tensor(output), first_tensor(output)


def _fused_norm_reader(module: nn.Module) -> Reader:
    def read(args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> tuple[Tensor, Tensor]:
        normalized = fused_norm_output(module, args[0])
        return normalized, normalized

    return read


def _read_layer(args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> tuple[Tensor, Tensor]:
    """Return the hidden states before and after a layer."""
    return (args[0] if args else kwargs["hidden_states"]), first_tensor(output)

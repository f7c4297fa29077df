"""Places of a plain PyTorch model with Hugging Face module names; needs neither megatron nor transformers.

The names in the score file are those of Megatron-Core, so that a file doesn't tell by which library it was made.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from megascore.errors import ModelError
from megascore.parallel.axes import Axis, Placement, Role
from megascore.parallel.comm import world_rank, world_size
from megascore.sites.families import HEADS
from megascore.sites.flat_tokens import FlatTokens
from megascore.sites.heads import config_kv_heads, plain_heads
from megascore.sites.inventory import is_norm, joined, norm_width, unaccounted
from megascore.sites.places import Place, first_tensor
from megascore.sites.plain_experts import ExpertReader, FusedExperts
from megascore.sites.targets import PlaceKind
from megascore.sites.towers import find_tower

__all__ = ["PlainModelView"]

EXPERTS_PER_TOKEN = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts")
"""What configs call the number of experts that a token goes to."""


class PlainModelView:
    """A Hugging Face style model on this process; with torch.distributed, every process is a data-parallel replica.

    Raises:
        ModelError: the model has no sequence of layers with the module names of a known family.
    """

    def __init__(self, model: nn.Module) -> None:
        """Find the layers and read the model's sizes from its config."""
        self.modules: Sequence[nn.Module] = (model,)
        tower = find_tower(model)
        self._family, self._layers = tower.family, tower.layers
        self._prefix = f"{tower.holder}." if tower.holder else ""
        self._config = _text_config(model, tower.holder)
        self._hidden_size = int(self._config.hidden_size)

    @cached_property
    def facts(self) -> Mapping[str, Any]:
        """Sizes of the model, from its Hugging Face config."""
        config = self._config
        heads, hidden = config.num_attention_heads, self._hidden_size
        return {
            "name": getattr(config, "_name_or_path", "") or type(self.modules[0]).__name__,
            "num_layers": len(self._layers),
            "hidden_size": hidden,
            "num_attention_heads": heads,
            # With multi-latent attention each head has keys and values of its own.
            "num_kv_heads": heads if hasattr(config, "kv_lora_rank") else config_kv_heads(config) or heads,
            "head_dim": _head_size(config),
            "ffn_hidden_size": self._ffn_size(),
            **self._expert_facts(),
        }

    def _ffn_size(self) -> int:
        """Return what the first FFN that is scored has; of a model without any, what the config says, or 0."""
        widths = (p.placement.shard.total for p in self.places if p.kind is PlaceKind.FFN_PROJECTION)
        return next(widths, int(getattr(self._config, "intermediate_size", None) or 0))

    def _expert_facts(self) -> Mapping[str, int]:
        """Return the sizes of the experts that are scored; empty where there are none."""
        first = {place.kind: place.placement.shard.total for place in reversed(self.places)}
        if PlaceKind.ROUTED_EXPERTS not in first:
            return {}
        chosen = (getattr(self._config, name, None) for name in EXPERTS_PER_TOKEN)
        number = next((int(value) for value in chosen if value), None)
        return {
            "num_experts": first[PlaceKind.ROUTED_EXPERTS],
            **({} if number is None else {"experts_per_token": number}),
            "expert_ffn_size": first[PlaceKind.ROUTED_EXPERT_PROJECTION],
            "shared_expert_ffn_size": first.get(PlaceKind.SHARED_EXPERT_PROJECTION, 0),
        }

    @cached_property
    def unknown(self) -> Sequence[str]:
        """Modules with channels, heads or experts that are neither scored nor known to be scored elsewhere."""
        names = {f"{place.local_name}." for place in self.places if place.kind is not PlaceKind.LAYER}
        found = []
        for number, layer in enumerate(self._layers):
            path = f"{self._prefix}{self._family.list_name}.{number}."
            scored = {name[len(path) : -1] for name in names if name.startswith(path)}
            for inside, what in unaccounted(layer, scored | self._family.inputs):
                found.append(f"{joined(f'decoder.layers.{number}', inside)}: {what}")
        return found + [f"{path}: {what}" for path, what in unaccounted(self.modules[0], self._known_outside())]

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """The layers, in order."""
        return tuple(self._layers)

    @property
    def layout(self) -> Mapping[str, Any]:
        """Every process is a replica."""
        return {"data": world_size()}

    @cached_property
    def places(self) -> Sequence[Place]:
        """All scorable modules of the decoder."""
        return tuple(self._find_places())

    def _find_places(self) -> Iterator[Place]:
        for number, layer in enumerate(self._layers):
            path, name = f"{self._prefix}{self._family.list_name}.{number}", f"decoder.layers.{number}"
            yield self._place(PlaceKind.LAYER, name, layer, path, 1)
            modules = dict(layer.named_modules())
            for module_name, (kind, global_name) in self._family.projections.items():
                # Others, such as a sum of several products, have no inputs of which each is one column of a weight.
                if isinstance(getattr(modules.get(module_name), "in_features", None), int):
                    local_name = f"{path}.{module_name}"
                    found = self._projection(kind, f"{name}.{global_name}", modules, module_name, local_name)
                    if kind is PlaceKind.SHARED_EXPERT_PROJECTION:
                        tokens = FlatTokens(f"{name}.{global_name}", layer)
                        found = (replace(place, read=tokens.read, mask_follower=tokens) for place in found)
                    yield from found
            for module_name in self._family.experts:
                if module_name in modules and FusedExperts.is_one(modules[module_name]):
                    yield from self._experts(f"{name}.mlp", modules[module_name], f"{path}.{module_name}")
            for module_name, global_name in self._norms_of(layer).items():
                yield self._norm(f"{name}.{global_name}", modules[module_name], f"{path}.{module_name}")
        modules = dict(self.modules[0].named_modules())
        for place, name in self._family.outer_norms.items():
            local_name = self._outside(place)
            # Embeddings of another width are no part of the hidden states that run through the layers.
            if local_name in modules and norm_width(modules[local_name]) in (self._hidden_size, None):
                yield self._norm(name, modules[local_name], local_name)

    def _norms_of(self, layer: nn.Module) -> Mapping[str, str]:
        """Return the norms of a layer over the hidden size, with their global names; none where these are unknown."""
        found = {
            name
            for name, module in layer.named_modules()
            if name not in self._family.inputs
            and is_norm(name.rpartition(".")[2], module)
            and norm_width(module) in (self._hidden_size, None)
        }
        # Those inside of attention or MLP do not say where the others stand.
        direct = {name for name in found if "." not in name}
        return next((names for names in self._family.norms if names.keys() in (found, direct)), {})

    def _projection(
        self, kind: PlaceKind, name: str, modules: Mapping[str, nn.Module], module_name: str, local_name: str
    ) -> Iterator[Place]:
        module: Any = modules[module_name]
        width = int(module.in_features)
        if kind is not PlaceKind.ATTENTION_PROJECTION:
            yield self._place(kind, name, module, local_name, width)
            return
        heads = plain_heads(name, modules.get(self._family.attention, module), width, self._config)
        place = self._place(kind, name, module, local_name, width, heads.num_heads)
        yield replace(place, num_competing_groups=heads.num_kv_heads)
        if heads.num_kv_heads is not None:
            yield self._place(PlaceKind.KV_HEADS, name, module, local_name, heads.num_kv_heads)

    def _experts(self, name: str, module: nn.Module, local_name: str) -> Iterator[Place]:
        experts = FusedExperts(f"{name}.experts", module)
        for expert in (None, *range(experts.num_experts)):
            reader = ExpertReader(experts, expert)
            common: dict[str, Any] = {"read": reader.read, "local_mask": reader.mask}
            if expert is None:
                place = self._place(PlaceKind.ROUTED_EXPERTS, experts.name, module, local_name, experts.num_experts)
                common["num_features"] = experts.num_features
            else:
                kind, inside = PlaceKind.ROUTED_EXPERT_PROJECTION, f"{experts.name}.{expert}.linear_fc2"
                place = self._place(kind, inside, module, local_name, experts.ffn_size)
                common["scored_module"] = partial(experts.projection, expert)
            yield replace(place, **common)

    def _norm(self, name: str, module: nn.Module, local_name: str) -> Place:
        return self._place(PlaceKind.NORM, name, module, local_name, self._hidden_size)

    def _outside(self, place: str) -> str:
        """Return the local name of a module that a `Family` names by its place from what holds the layers."""
        holder = self._prefix.rstrip(".")
        around = holder.rpartition(".")[0] if place.startswith("..") else holder
        return ".".join(part for part in (around, place.removeprefix("..")) if part)

    def _known_outside(self) -> set[str]:
        """Return the paths of what needs no score outside of the layers, and of the layers themselves."""
        family, holder = self._family, self._prefix.rstrip(".").split(".")
        around = [".".join((*holder[:depth], "")).lstrip(".") for depth in range(len(holder) + 1)]
        return {
            f"{self._prefix}{family.list_name}",
            *(place.local_name for place in self.places if place.kind is PlaceKind.NORM),
            *(self._outside(place) for place in family.outer_inputs),
            *(f"{path}{head}" for path in around for head in HEADS),
        }

    def _place(
        self,
        kind: PlaceKind,
        name: str,
        module: nn.Module,
        local_name: str,
        num_channels: int,
        num_heads: int | None = None,
    ) -> Place:
        replicas = Axis("dp", world_rank(), world_size())
        placement = Placement.whole(num_channels, ((replicas, Role.SUM),))
        read = _read_norm if kind is PlaceKind.NORM else _read
        groups = {"dp": dist.group.WORLD} if dist.group.WORLD is not None and world_size() > 1 else {}
        return Place(kind, name, module, local_name, placement, read, groups=groups, num_heads=num_heads)


def _read(args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> tuple[Tensor, Tensor]:
    """Return input and output of a module whose tensors are [B, S, C], as views [S, B, C]."""
    inputs = args[0] if args else kwargs.get("hidden_states", next(iter(kwargs.values())))
    return _sequence_first(inputs), _sequence_first(first_tensor(output))


def _read_norm(args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> tuple[Tensor, Tensor]:
    """Return the output of a norm twice, as a view [S, B, C]."""
    normalized = _sequence_first(first_tensor(output))
    return normalized, normalized


def _sequence_first(tensor: Tensor) -> Tensor:
    return tensor.transpose(0, 1) if tensor.dim() == 3 else tensor


def _head_size(config: Any) -> int:
    """Return the size of a head's part of the attention's output."""
    sizes = (getattr(config, name, None) for name in ("v_head_dim", "head_dim"))
    return next((int(size) for size in sizes if size), config.hidden_size // config.num_attention_heads)


def _text_config(model: nn.Module, holder: str) -> Any:
    """Return the config with the sizes of the layers: of what holds them, or of the next module around it."""
    modules, path = dict(model.named_modules()), holder
    around = [path]
    while path:
        path = path.rpartition(".")[0]
        around.append(path)
    for name in around:
        config = getattr(modules[name], "config", None)
        config = getattr(config, "text_config", None) or config
        if config is not None and all(hasattr(config, size) for size in ("num_attention_heads", "hidden_size")):
            return config
    raise ModelError(
        f"{type(model).__name__} has no Hugging Face 'config' with num_attention_heads and hidden_size: attach "
        "needs one."
    )

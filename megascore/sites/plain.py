"""Places of a plain PyTorch model with Hugging Face module names; needs neither megatron nor transformers.

The names in the score file are those of Megatron-Core, so that a file doesn't tell by which library it was made.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from megascore.errors import ModelError
from megascore.parallel.axes import Axis, Placement, Role
from megascore.parallel.comm import world_rank, world_size
from megascore.sites.families import FAMILIES, Family
from megascore.sites.places import Place, first_tensor
from megascore.sites.targets import PlaceKind

__all__ = ["PlainModelView"]


class PlainModelView:
    """A Hugging Face style model on this process; with torch.distributed, every process is a data-parallel replica.

    Raises:
        ModelError: the model has no sequence of layers with the module names of a known family.
    """

    def __init__(self, model: nn.Module) -> None:
        """Find the layers and read the model's sizes from its config."""
        self.modules: Sequence[nn.Module] = (model,)
        self._family, self._prefix, self._layers = _find_layers(model)
        self._config = _text_config(model)

    @cached_property
    def facts(self) -> Mapping[str, Any]:
        """Sizes of the model, from its Hugging Face config."""
        config = self._config
        heads, hidden = config.num_attention_heads, config.hidden_size
        return {
            "name": getattr(config, "_name_or_path", "") or type(self.modules[0]).__name__,
            "num_layers": len(self._layers),
            "hidden_size": hidden,
            "num_attention_heads": heads,
            "num_kv_heads": getattr(config, "num_key_value_heads", None) or heads,
            "head_dim": getattr(config, "head_dim", None) or hidden // heads,
            "ffn_hidden_size": config.intermediate_size,
        }

    @property
    def unknown(self) -> Sequence[str]:
        """Layers without one of the modules that are looked for."""
        return [
            f"decoder.layers.{number}: no {module_name}"
            for number, layer in enumerate(self._layers)
            for module_name in self._family.modules
            if not any(name == module_name for name, _ in layer.named_modules())
        ]

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
            for module_name, (kind, global_name) in self._family.modules.items():
                if module_name in modules:
                    yield self._linear_or_norm(
                        kind, f"{name}.{global_name}", modules[module_name], f"{path}.{module_name}"
                    )
            if (projection := modules.get(self._family.projection)) is not None:
                local_name = f"{path}.{self._family.projection}"
                num_kv_heads = int(self.facts["num_kv_heads"])
                yield self._place(
                    PlaceKind.KV_HEADS, f"{name}.self_attention.linear_proj", projection, local_name, num_kv_heads
                )
        modules = dict(self.modules[0].named_modules())
        for place, name in self._family.outer_norms.items():
            around = place.startswith("..")
            prefix = self._prefix.rpartition(".")[0].rpartition(".")[0] if around else self._prefix.rstrip(".")
            local_name = ".".join(part for part in (prefix, place.removeprefix("..")) if part)
            # Embeddings of another width are no part of the hidden states that run through the layers.
            width = getattr(getattr(modules.get(local_name), "weight", None), "shape", None)
            if width == (self.facts["hidden_size"],):
                yield self._linear_or_norm(PlaceKind.NORM, name, modules[local_name], local_name)

    def _linear_or_norm(self, kind: PlaceKind, name: str, module: nn.Module, local_name: str) -> Place:
        width = self.facts["hidden_size"] if kind is PlaceKind.NORM else module.in_features
        assert isinstance(width, int)
        return self._place(kind, name, module, local_name, width)

    def _place(self, kind: PlaceKind, name: str, module: nn.Module, local_name: str, num_channels: int) -> Place:
        replicas = Axis("dp", world_rank(), world_size())
        placement = Placement.whole(num_channels, ((replicas, Role.SUM),))
        read = _read_norm if kind is PlaceKind.NORM else _read
        groups = {"dp": dist.group.WORLD} if dist.group.WORLD is not None and world_size() > 1 else {}
        return Place(kind, name, module, local_name, placement, read, groups=groups)


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


def _find_layers(model: nn.Module) -> tuple[Family, str, nn.ModuleList]:
    """Return the family, the prefix of the name of the module that holds the layers, and the layers."""
    for name, module in model.named_modules():
        for family in FAMILIES.values():
            # Among its own children: a compiled model has the attributes of the one inside as well.
            layers = dict(module.named_children()).get(family.list_name)
            if isinstance(layers, nn.ModuleList) and len(layers) and hasattr(layers[0], family.marker):
                return family, (f"{name}." if name else ""), layers
    children = ", ".join(name for name, _ in model.named_children())
    known = " or ".join(f"'{family.list_name}' with '{family.marker}' inside" for family in FAMILIES.values())
    raise ModelError(
        f"{type(model).__name__} has no {known} (found: {children}). Plain models need the module names of the Llama "
        "family (mlp.down_proj, self_attn.o_proj) or of BERT; a Megatron-Core model is recognised by its own class."
    )


def _text_config(model: nn.Module) -> Any:
    """Return the config with the sizes of the decoder, below any wrapper."""
    for module in model.modules():
        config = getattr(module, "config", None)
        config = getattr(config, "text_config", None) or config
        if config is not None and hasattr(config, "num_attention_heads"):
            return config
    raise ModelError(f"{type(model).__name__} has no Hugging Face 'config' with num_attention_heads: attach needs one.")

"""Which stack of layers of a plain model is scored: its only one, or that of its language model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import nn

from megascore.errors import ModelError
from megascore.sites.families import FAMILIES, Family
from megascore.sites.inventory import joined

__all__ = ["Tower", "find_tower", "part_of"]

LANGUAGE_MODEL = "language_model"
"""What models of several kinds of input call the part that reads and writes text."""


class Tower(NamedTuple):
    """A stack of layers with what holds it."""

    family: Family
    holder: str
    """Path of the module whose child the layers are."""
    layers: nn.ModuleList

    @property
    def path(self) -> str:
        """Path of the layers."""
        return joined(self.holder, self.family.list_name)


def part_of(model: nn.Module, part: str | None) -> nn.Module:
    """Return the part of a model that is to be scored, by its dotted name; the model where none is given.

    Raises:
        ModelError: there is no such part.
    """
    if part is None:
        return model
    names = dict(model.named_modules(remove_duplicate=False))
    if part not in names:
        close = [name for name in names if name.count(".") <= part.count(".") and name][:12]
        raise ModelError(f"{type(model).__name__} has no part {part!r}. Parts of that depth: {', '.join(close)}.")
    found: nn.Module = names[part]
    return found


def find_tower(model: nn.Module) -> Tower:
    """Return the stack of layers to score.

    Of several it is the one inside of what ``get_decoder()`` returns, or of the only ``language_model``: the encoder of
    an encoder-decoder, and towers of images and sound, make what the language model reads.

    Raises:
        ModelError: there is none with known names, or several, of which none is the language model's alone.
    """
    towers = _towers(model)
    if not towers:
        raise _unknown(model)
    if len(towers) == 1:
        return towers[0]
    for language_model in (_decoder(model), _language_model(model)):
        for is_of in (_has_child, _holds):
            own = [tower for tower in towers if language_model is not None and is_of(language_model, tower.layers)]
            if len(own) == 1:
                return own[0]
    paths = [tower.path for tower in towers]
    raise ModelError(
        f"{type(model).__name__} has several stacks of layers ({', '.join(paths)}), and does not say which one is its "
        f"language model. Name the part to score: attach(model, part={towers[-1].holder!r})."
    )


def _towers(model: nn.Module) -> list[Tower]:
    found: list[Tower] = []
    for name, module in model.named_modules():
        # Layers inside of layers are no stack of the model.
        if any(f"{name}.".startswith(f"{tower.path}.") for tower in found):
            continue
        for family in FAMILIES.values():
            # Among its own children: a compiled model has the attributes of the one inside as well.
            layers = dict(module.named_children()).get(family.list_name)
            if isinstance(layers, nn.ModuleList) and any(hasattr(layer, family.marker) for layer in layers):
                found.append(Tower(family, name, layers))
                break
    return found


def _decoder(model: nn.Module) -> nn.Module | None:
    """Return what Hugging Face's ``get_decoder`` does; None for a model without."""
    get: Callable[[], Any] | None = getattr(model, "get_decoder", None)
    decoder = None if get is None else get()
    return decoder if isinstance(decoder, nn.Module) else None


def _language_model(model: nn.Module) -> nn.Module | None:
    found = [module for name, module in model.named_modules() if name.rpartition(".")[2] == LANGUAGE_MODEL]
    return found[0] if len(found) == 1 else None


def _has_child(module: nn.Module, layers: nn.ModuleList) -> bool:
    return any(child is layers for child in module.children())


def _holds(module: nn.Module, layers: nn.ModuleList) -> bool:
    return any(part is layers for part in module.modules())


def _unknown(model: nn.Module) -> ModelError:
    children = ", ".join(name for name, _ in model.named_children())
    known = " or ".join(f"'{family.list_name}' with '{family.marker}' inside" for family in FAMILIES.values())
    return ModelError(
        f"{type(model).__name__} has no {known} (found: {children}). Plain models need the module names of the Llama "
        "family (mlp.down_proj, self_attn.o_proj) or of BERT; a Megatron-Core model is recognised by its own class."
    )

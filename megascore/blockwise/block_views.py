"""Parts of a model for scoring one block at a time: which modules are blocks, and which places lie in each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from megascore.errors import ModelError
from megascore.sites.places import ModelView, Place

__all__ = ["PartView", "find_blocks", "places_by_block"]


@dataclass(frozen=True)
class PartView:
    """A view of a model that shows only some of its places."""

    whole: ModelView
    modules: Sequence[nn.Module]
    """The modules in which the places are."""
    places: Sequence[Place]

    @property
    def facts(self) -> Mapping[str, Any]:
        """Sizes of the whole model."""
        return self.whole.facts

    @property
    def unknown(self) -> Sequence[str]:
        """Nothing: what is unknown in the model is told of the whole."""
        return ()

    @property
    def layout(self) -> Mapping[str, Any]:
        """Degrees of the parallel axes."""
        return self.whole.layout


def places_by_block(
    places: Sequence[Place], blocks: Sequence[nn.Module]
) -> tuple[list[tuple[Place, ...]], tuple[Place, ...]]:
    """Return the places in each block, and those outside of all blocks."""
    owner = {id(module): number for number, block in enumerate(blocks) for module in block.modules()}
    inside: list[list[Place]] = [[] for _ in blocks]
    outside: list[Place] = []
    for place in places:
        number = owner.get(id(place.module))
        (outside if number is None else inside[number]).append(place)
    return [tuple(own) for own in inside], tuple(outside)


def find_blocks(model: nn.Module, blocks: Sequence[nn.Module] | nn.Module | str) -> tuple[nn.Module, ...]:
    """Return the blocks of a model.

    Args:
        model: The whole of it.
        blocks: Modules of it, a list module (`nn.ModuleList`, `nn.Sequential`), or the dotted name of one.

    Raises:
        ModelError: there is no such list, it is empty, or it holds what is no module of the model or is there twice.
    """
    found = _submodule(model, blocks) if isinstance(blocks, str) else blocks
    if isinstance(found, nn.Module) and not isinstance(found, (nn.ModuleList, nn.Sequential)):
        what = f"'{blocks}'" if isinstance(blocks, str) else "blocks"
        raise ModelError(f"{what} is a {type(found).__name__}, not a sequence of blocks; {_lists_of(model)}.")
    if not isinstance(found, (nn.ModuleList, nn.Sequential, Sequence)):
        raise ModelError(f"blocks is a {type(found).__name__}: expected modules in a sequence, or its dotted name.")
    sequence = tuple(found)
    if not sequence:
        raise ModelError(f"there are no blocks: the sequence is empty; {_lists_of(model)}.")
    own = {id(module): name for name, module in model.named_modules()}
    for number, block in enumerate(sequence):
        if not isinstance(block, nn.Module) or id(block) not in own:
            raise ModelError(f"block {number} ({type(block).__name__}) is not a module of the model.")
    _check_separate(sequence, own)
    return sequence


def _check_separate(blocks: Sequence[nn.Module], names: Mapping[int, str]) -> None:
    """Refuse a module that belongs to two blocks: it could not be run with either alone."""
    owner: dict[int, int] = {}
    for number, block in enumerate(blocks):
        for module in block.modules():
            if owner.setdefault(id(module), number) != number:
                raise ModelError(
                    f"{names[id(module)]} is part of block {owner[id(module)]} and of block {number}: blocks must not "
                    "share modules."
                )


def _submodule(model: nn.Module, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError as error:
        raise ModelError(f"{type(model).__name__} has no blocks '{name}' ({error}); {_lists_of(model)}.") from error


def _lists_of(model: nn.Module) -> str:
    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    return "its lists of modules: " + (", ".join(f"{name} ({len(lists[name])})" for name in lists) or "none")

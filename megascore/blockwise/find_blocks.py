"""Blocks of a model, found by what a user names: modules, a list of them, or its dotted name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from megascore.errors import ModelError

__all__ = ["find_blocks"]


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

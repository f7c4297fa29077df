"""A walk through the arguments of a call: containers are rebuilt, what was shared stays shared, the rest is left."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

__all__ = ["nested_leaves", "nested_move_to", "nested_replace"]

Value = TypeVar("Value")
Leaf = TypeVar("Leaf")


def nested_move_to(value: Value, device: torch.device | str) -> Value:
    """Return ``value`` with every tensor in it on ``device``.

    Goes through lists, tuples, named tuples, dicts and other mappings, subclasses of these, and dataclasses (frozen
    ones and fields with ``init=False`` too; no constructor of a dataclass runs). Lists, dicts and dataclasses come back
    as new objects, so that changes to them do not reach the original; a tuple in which nothing moved is the same
    object, and so is everything else: numbers, text, modules, caches, sets. Two places that held the same tensor or
    the same container still do, and a container that holds itself is no trouble.

    Args:
        value: Anything.
        device: Where to; a tensor that is there already is not copied.

    Returns:
        The same kind of thing.
    """
    return nested_replace(value, Tensor, lambda tensor: tensor.to(device))


def nested_replace(value: Value, kind: type[Leaf], function: Callable[[Leaf], Any]) -> Value:
    """Return ``value`` with every instance of ``kind`` in it replaced by what ``function`` makes of it.

    The function is called once for each object, however often that occurs. Containers are as in `nested_move_to`.
    """
    return cast(Value, _Replacement(kind, function).of(value))


def nested_leaves(value: Any, kind: type[Leaf]) -> list[Leaf]:
    """Return every instance of ``kind`` in ``value`` once, in the order in which they are met."""
    found: list[Leaf] = []

    def note(leaf: Leaf) -> Leaf:
        found.append(leaf)
        return leaf

    nested_replace(value, kind, note)
    return found


class _Replacement:
    """One walk, with a memory of what was met: by identity, as `copy.deepcopy` does."""

    def __init__(self, kind: type[Any], function: Callable[[Any], Any]) -> None:
        self._kind = kind
        self._function = function
        self._done: dict[int, Any] = {}

    def of(self, value: Any) -> Any:
        if id(value) in self._done:
            return self._done[id(value)]
        if isinstance(value, self._kind):
            replaced = self._function(value)
        elif dataclasses.is_dataclass(value) and not isinstance(value, type):
            return self._dataclass(value)
        elif isinstance(value, list):
            return self._list(value)
        elif isinstance(value, dict):
            return self._dict(value)
        elif isinstance(value, tuple):
            replaced = self._tuple(value)
        elif isinstance(value, Mapping):
            replaced = self._mapping(value)
        else:
            return value
        # A walk through a cycle may have come here first.
        return self._done.setdefault(id(value), replaced)

    # What can hold itself is known before its content is looked at.

    def _dataclass(self, value: Any) -> Any:
        copied = self._done[id(value)] = copy.copy(value)
        # Some are mappings as well, and keep both in step when they are set; frozen ones refuse to be set.
        frozen = value.__dataclass_params__.frozen
        for field in dataclasses.fields(value):
            if hasattr(value, field.name):
                content = self.of(getattr(value, field.name))
                if frozen:
                    object.__setattr__(copied, field.name, content)
                else:
                    setattr(copied, field.name, content)
        return copied

    def _list(self, value: list[Any]) -> list[Any]:
        copied = self._done[id(value)] = copy.copy(value)
        copied[:] = [self.of(item) for item in value]
        return copied

    def _dict(self, value: dict[Any, Any]) -> dict[Any, Any]:
        copied = self._done[id(value)] = copy.copy(value)
        for key, item in value.items():
            copied[key] = self.of(item)
        return copied

    def _tuple(self, value: tuple[Any, ...]) -> tuple[Any, ...]:
        items = [self.of(item) for item in value]
        if all(new is old for new, old in zip(items, value, strict=True)):
            return value
        if hasattr(value, "_make"):  # a named tuple, whose constructor takes the items one by one
            return cast("tuple[Any, ...]", value._make(items))
        return type(value)(items)

    def _mapping(self, value: Mapping[Any, Any]) -> Mapping[Any, Any]:
        items = {key: self.of(item) for key, item in value.items()}
        # A mapping of an unknown make is built anew only where it must be.
        if all(items[key] is item for key, item in value.items()):
            return value
        return type(value)(items)  # type: ignore[call-arg]  # as all mappings of the standard library allow

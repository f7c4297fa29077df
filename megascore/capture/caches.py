"""Caches of keys and values, with which a model generates: they grow whenever a block runs, also on the same inputs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

from torch import nn

from megascore.capture.calls import BlockCall
from megascore.capture.nested import nested_leaves
from megascore.errors import ModelError

__all__ = ["refuse_caches", "without_caches"]


@runtime_checkable
class _Cache(Protocol):
    """What the caches of transformers have in common."""

    def get_seq_length(self) -> int:
        """Return how many tokens it holds."""

    def update(self, *args: Any) -> Any:
        """Add keys and values of a layer."""


@contextmanager
def without_caches(model: nn.Module) -> Iterator[None]:
    """Have a model make no caches of its own accord; its settings are as before afterwards."""
    configs = {id(config): config for module in model.modules() if (config := getattr(module, "config", None))}
    caching = [config for config in configs.values() if getattr(config, "use_cache", None) is True]
    try:
        for config in caching:
            config.use_cache = False
        yield
    finally:
        for config in caching:
            config.use_cache = True


def refuse_caches(call: BlockCall) -> None:
    """Refuse a call with a cache in any of its arguments: whoever repeats it would see the times before.

    Kept, it would also hold keys and values of all layers before, outside of any store.

    Raises:
        ModelError: there is one.
    """
    named = {**{f"argument {position}": value for position, value in enumerate(call.args)}, **call.kwargs}
    for name, value in named.items():
        caches = nested_leaves(value, _Cache)  # type: ignore[type-abstract]  # only asked with isinstance
        if caches:
            holds = "is" if caches[0] is value else "holds"
            raise ModelError(
                f"blocks are given a cache ({name} {holds} a {type(caches[0]).__name__}): leave it out of the batches, "
                "and where the model makes it, call it with use_cache=False."
            )

"""Caches with which a model generates: blocks write keys, values or states into them, also on the same inputs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from megascore.capture.calls import BlockCall
from megascore.capture.nested import nested_leaves
from megascore.errors import ModelError

__all__ = ["refuse_caches", "without_caches"]


# What blocks write into, by their methods and attributes: the argument that brings one has had several names.
_MARKS = (
    ("get_seq_length", "update"),  # keys and values, in transformers
    ("update_conv_state",),  # states of Mamba and of linear attention there
    ("update_ssm_state",),
    ("update_recurrent_state",),
    ("rnn_state", "seqlen_offset"),  # of xLSTM
    ("is_static_batching",),  # inference contexts of Megatron
)


class _CacheMeta(type):
    def __instancecheck__(cls, value: object) -> bool:
        # Without getattr, to which some objects answer with anything.
        kind, own = type(value), getattr(value, "__dict__", {})
        return any(all(hasattr(kind, name) or name in own for name in names) for names in _MARKS)


class _Cache(metaclass=_CacheMeta):
    """Whatever has the marks of one."""


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

    Kept, it would also hold keys and values of all layers before, outside of any store. A cache is known by what it
    is, not by the argument's name. A tuple of keys and values, as older models take it, is an argument like any
    other: blocks return a longer one, and leave it as it is.

    Raises:
        ModelError: there is one.
    """
    named = {**{f"argument {position}": value for position, value in enumerate(call.args)}, **call.kwargs}
    for name, value in named.items():
        caches = nested_leaves(value, _Cache)
        if caches:
            holds = "is" if caches[0] is value else "holds"
            raise ModelError(
                f"blocks are given a cache ({name} {holds} a {type(caches[0]).__name__}): leave it out of the batches, "
                "and where the model makes it, call it with use_cache=False."
            )

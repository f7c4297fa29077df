"""The registry of scores: every hook class that says what it ranks is a method, wherever it is defined.

``class Spread(ForwardHook, method="spread", targets=("ffn",), summary="...")`` makes ``{target: ffn, method: spread}``
known to everything that reads a list of scores. Nothing else names it.

>>> import megascore.hooks
>>> methods_of("kv_heads")["independent_contribution"].hook.__name__
'IndependentKvHeadContributionHook'
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from megascore.errors import ConfigError
from megascore.hooks.base import ForwardHook
from megascore.hooks.method import Method

__all__ = ["methods", "methods_of"]


def methods() -> dict[tuple[str, str], Method]:
    """Return every method by the target that it ranks and its own name; subclasses come behind their base.

    Raises:
        ConfigError: two classes claim one pair.
    """
    found: dict[tuple[str, str], Method] = {}
    base: Any = ForwardHook
    for hook in _subclasses(base):
        own: Method | None = vars(hook).get("measures")
        for target in own.targets if own is not None else ():
            assert own is not None
            first = found.get((target, own.name), own)
            # A class that is defined again, as in a notebook, takes the place of the one before.
            if _path(first.hook) != _path(hook):
                raise ConfigError(
                    f"{_path(first.hook)} and {_path(hook)} both say that they rank '{target}' by '{own.name}': rename "
                    "the method of one of them."
                )
            found[target, own.name] = own
    return found


def methods_of(target: str) -> dict[str, Method]:
    """Return the methods that can rank a target, by name; none for a target that nothing ranks."""
    return {name: method for (ranked, name), method in methods().items() if ranked == target}


def _subclasses(base: type[ForwardHook]) -> Iterator[type[ForwardHook]]:
    for hook in base.__subclasses__():
        yield hook
        yield from _subclasses(hook)


def _path(hook: type) -> str:
    return f"{hook.__module__}.{hook.__qualname__}"

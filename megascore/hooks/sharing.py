"""One hook for several methods: what one class of a family reads, it reads once for all of them."""

from __future__ import annotations

from functools import cache

from megascore.hooks.base import ForwardHook

__all__ = ["together"]


@cache
def together(hooks: frozenset[type[ForwardHook]]) -> type[ForwardHook]:
    """Return the class of a hook that keeps what the methods of several classes need.

    Its own score means nothing: each of the classes computes its own from the common state.

    Args:
        hooks: Subclasses of one class that is `ForwardHook.shared`.
    """
    (root,) = {hook.shared for hook in hooks}
    assert root is not None, f"{hooks} share nothing"
    names = ", ".join(sorted(hook.__name__ for hook in hooks))
    own = {
        "keeps": tuple(sorted({name for hook in hooks for name in hook.keeps})),
        "routed": any(getattr(hook, "routed", False) for hook in hooks),
        "__doc__": f"Serves {names}.",
    }
    return type(f"Together{root.__name__}", (root,), own)

"""The end of a forward pass, once everything that is looked at has been reached."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from megascore.capture.block_inputs import Halt

__all__ = ["HaltAfter"]


class HaltAfter:
    """Ends a pass when each of some modules has run in it; a pass in which one of them does not run goes to its end.

    What comes behind, such as the projection to the vocabulary, takes a large part of a pass's time and memory.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        """Prepare; hooks are on inside the ``with`` block, behind those that are on these modules already."""
        self._modules = modules
        self._waiting: set[int] = set()
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> HaltAfter:
        """Put the hooks on."""
        self._handles = [module.register_forward_hook(self._note) for module in self._modules]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()

    def run(self, forward: Callable[..., object], *args: Any) -> None:
        """Run one pass."""
        self._waiting = {id(module) for module in self._modules}
        try:
            forward(*args)
        except Halt as halt:
            halt.catch(self)

    def _note(self, module: nn.Module, _args: object, _output: object) -> None:
        self._waiting.discard(id(module))
        if not self._waiting:
            raise Halt(self)

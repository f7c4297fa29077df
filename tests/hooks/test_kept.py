"""Memory of hooks: each names all tensors that it keeps, so that a dry run counts them. Pure, seconds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from megascore.hooks import ForwardHook, L2NormHook
from tests.hooks.cases import NUM_CALLS, Case, every_class, feed, random_calls

pytestmark = pytest.mark.fast

__all__ = ["ListHook"]


class ListHook(L2NormHook):
    """A hook that keeps a list of tensors, and says so."""

    def __init__(self) -> None:
        super().__init__()
        self.history = [torch.zeros(5, dtype=torch.float64), torch.zeros(3, dtype=torch.float32)]

    def kept(self) -> tuple[Tensor, ...]:
        return (*super().kept(), *self.history)


class ForgetfulHook(ListHook):
    """The same, but it does not say so."""

    def kept(self) -> tuple[Tensor, ...]:
        return L2NormHook.kept(self)


def tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple, Mapping)):
        for inner in value.values() if isinstance(value, Mapping) else value:
            yield from tensors_in(inner)


def unnamed(hook: ForwardHook) -> list[str]:
    """Return the attributes with a tensor that the hook names neither as kept nor as waiting."""
    named = {id(tensor) for tensor in (*hook.kept(), *hook.pending())}
    return [name for name, value in vars(hook).items() if any(id(tensor) not in named for tensor in tensors_in(value))]


@every_class
@pytest.mark.parametrize("num_calls", [0, 1, NUM_CALLS])
def test_every_tensor_of_a_hook_is_named(case: Case, num_calls: int) -> None:
    module = case.make_module(12, torch.float32)
    hook = feed(case.make_hook(module, NUM_CALLS), random_calls(module)[:num_calls])
    assert unnamed(hook) == []


def test_a_hook_that_forgets_a_list_is_found() -> None:
    assert unnamed(ListHook()) == []
    assert unnamed(ForgetfulHook()) == ["history"]

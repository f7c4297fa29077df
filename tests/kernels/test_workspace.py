"""Memory that calls use again: it is given back, it is never confused, and what it held before never shows."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor, nn

from megascore.kernels import workspace
from megascore.kernels.workspace import CAPACITY, Workspace
from tests.hooks.cases import CASES, Case

pytestmark = pytest.mark.fast

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def fresh_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workspace, "_kept", workspace._Kept())


def test_temporaries_do_not_overlap_and_are_used_again() -> None:
    with Workspace(CPU) as outer:
        first = outer.empty((3, 5), torch.float32)
        with Workspace(CPU) as inner:
            second = inner.empty((7,), torch.float64)
            address = second.data_ptr()
        third = outer.empty((2,), torch.bfloat16)
        first.fill_(1)
        third.fill_(2)
        assert bool((first == 1).all())
        assert third.data_ptr() == address
        assert third.data_ptr() >= first.data_ptr() + first.nbytes
    with Workspace(CPU) as again:
        assert again.empty((1,), torch.float32).data_ptr() == first.data_ptr()


def test_memory_is_given_back_after_an_error() -> None:
    with pytest.raises(RuntimeError), Workspace(CPU) as failing:
        failing.empty((10,), torch.float32)
        raise RuntimeError
    assert workspace._kept.used == 0


def test_what_does_not_fit_is_allocated() -> None:
    with Workspace(CPU) as most:
        most.empty((CAPACITY - 64,), torch.uint8)
        extra = most.empty((100,), torch.float32)
        extra.fill_(1)
        assert workspace._kept.used <= CAPACITY


def test_each_thread_has_its_own() -> None:
    addresses = []

    def take() -> None:
        with Workspace(CPU) as own:
            addresses.append(own.empty((8,), torch.float32).data_ptr())

    threads = [threading.Thread(target=take) for _ in range(2)]
    take()
    for thread in threads:
        thread.start()
        thread.join()
    assert addresses[0] not in addresses[1:]


def test_memory_made_in_inference_mode_is_usable_outside() -> None:
    with torch.inference_mode(), Workspace(CPU) as first:
        first.empty((4,), torch.float32).zero_()
    with Workspace(CPU) as second:
        assert not second.empty((4,), torch.float32).zero_().is_inference()


def test_memory_is_on_the_cpu_whatever_the_default_device() -> None:
    before = torch.get_default_device()
    torch.set_default_device("meta")
    try:
        with Workspace(CPU) as own:
            assert own.empty((4,), torch.float32).device == CPU
    finally:
        torch.set_default_device(before)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("num_tokens", [5, 700])
def test_what_the_memory_held_before_never_shows(case: Case, num_tokens: int) -> None:
    num_channels = 48
    torch.manual_seed(0)
    module = case.make_module(num_channels, torch.float32)
    linear = nn.Linear(num_channels, 24, bias=False)
    module = module if case.norm else linear
    calls = [torch.randn(num_tokens, 2, num_channels) for _ in range(2)]
    results: list[dict[str, Tensor]] = []
    for content in (0.0, float("nan")):
        with Workspace(CPU) as whole:
            whole.empty((CAPACITY // 4,), torch.float32).fill_(content)
        hook = case.make_hook(module, num_channels)
        for x in calls:
            hook(module, (x,), module(x))
        results.append({name: value.clone() for name, value in hook.state.items()})
    for name, value in results[0].items():
        assert torch.equal(value, results[1][name]), name

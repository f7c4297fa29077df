"""The CUDA stand-in. Tier: real Megatron on the CPU."""

from __future__ import annotations

import pytest
import torch
from megatron.core.tensor_parallel import random as megatron_random

from megascore.errors import ConfigError
from megascore.mcore.cpu.stand_in import cpu_stand_in


def seen_from_outside() -> tuple[object, ...]:
    return (
        torch.cuda.current_device,
        torch.cuda.synchronize,
        megatron_random._CUDA_RNG_STATE_TRACKER,
        megatron_random._CUDA_RNG_STATE_TRACKER_INITIALIZED,
    )


def test_cuda_means_the_cpu_inside() -> None:
    with cpu_stand_in():
        assert str(torch.cuda.current_device()) == "cpu"
        assert torch.zeros(2, device="cuda").device.type == "cpu"
        assert torch.zeros(2, device=torch.device("cuda", 0)).cuda(non_blocking=True).device.type == "cpu"
        assert not torch.tensor([1], pin_memory=True).is_pinned()
        torch.cuda.synchronize()
        with megatron_random.get_cuda_rng_tracker().fork():
            assert torch.ones(1).item() == 1


def test_everything_is_restored_after_an_error_in_a_nested_use() -> None:
    before = seen_from_outside()

    def fail_inside() -> None:
        with cpu_stand_in():
            with cpu_stand_in():
                pass
            assert torch.zeros(1, device="cuda").device.type == "cpu"
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail_inside()
    assert seen_from_outside() == before
    if not torch.cuda.is_available():
        with pytest.raises((AssertionError, RuntimeError), match="CUDA|NVIDIA"):
            torch.zeros(1, device="cuda")


def test_it_refuses_to_hide_cuda_that_is_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    with pytest.raises(ConfigError, match=r"already uses CUDA.*CUDA_VISIBLE_DEVICES=''"), cpu_stand_in():
        pass

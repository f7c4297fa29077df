"""Megatron-Core on a machine without CUDA.

Megatron's own modules name CUDA devices literally, even where everything they do would run on a CPU. `cpu_stand_in`
answers those calls with the CPU (or with PyTorch's meta device, whose tensors have shapes only) while it is entered,
and puts everything back when it is left.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from megatron.core.tensor_parallel import random as megatron_random
from torch.overrides import TorchFunctionMode

from megascore.errors import ConfigError
from megascore.mcore.cpu.experts import expert_replacements

__all__ = ["cpu_stand_in"]


CPU = torch.device("cpu")


@contextmanager
def cpu_stand_in(device: torch.device = CPU) -> Iterator[None]:
    """Let Megatron-Core build and run models on the CPU while this context is entered.

    It may be entered again inside itself. It holds for the whole process, except that the redirection of literal
    ``"cuda"`` devices holds for the entering thread.

    Args:
        device: What takes the place of CUDA devices: the CPU, or the meta device to build models without memory.

    Raises:
        ConfigError: this process already uses CUDA, which the stand-in would hide.
    """
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        raise ConfigError(
            "run.device=cpu, but this process already uses CUDA: start it anew with CUDA_VISIBLE_DEVICES='', "
            "or choose run.device=cuda."
        )
    with ExitStack() as stack:
        stack.enter_context(_replaced(torch.cuda, "current_device", lambda: device))
        stack.enter_context(_replaced(torch.cuda, "synchronize", lambda device=None: None))
        stack.enter_context(_replaced(megatron_random, "_CUDA_RNG_STATE_TRACKER", _NoRngTracker()))
        stack.enter_context(_replaced(megatron_random, "_CUDA_RNG_STATE_TRACKER_INITIALIZED", True))
        _replace_streams(stack)
        for owner, name, value in expert_replacements():
            stack.enter_context(_replaced(owner, name, value))
        stack.enter_context(_NoCuda(device))
        yield


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Give a name of a module or class another value meanwhile, also a name that it does not have."""
    missing = object()
    before = getattr(owner, name, missing)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if before is missing:
            delattr(owner, name)
        else:
            setattr(owner, name, before)


def _replace_streams(stack: ExitStack) -> None:
    """There is one stream, on which everything is done when the call returns."""
    # Classes, because other libraries name them in type annotations.
    stack.enter_context(_replaced(torch.cuda, "Stream", _NoStream))
    stack.enter_context(_replaced(torch.cuda, "Event", _NoEvent))
    stack.enter_context(_replaced(torch.cuda, "current_stream", _NoStream))
    stack.enter_context(_replaced(torch.cuda, "stream", lambda _stream: nullcontext()))


class _NoEvent:
    def __init__(self, *_args: Any, **_kwargs: Any) -> None:
        """Take what a CUDA event takes."""

    def synchronize(self) -> None:
        """Everything is done already."""


class _NoStream:
    def __init__(self, *_args: Any, **_kwargs: Any) -> None:
        """Take what a CUDA stream takes."""

    def wait_stream(self, _stream: Any) -> None:
        """Everything is done already."""

    def record_event(self, _event: Any = None) -> _NoEvent:
        return _NoEvent()


class _NoRngTracker(megatron_random.CudaRNGStatesTracker):  # type: ignore[misc]
    """Leaves random states alone: there is no dropout while scoring."""

    def fork(self, *_args: Any, **_kwargs: Any) -> AbstractContextManager[None]:
        return nullcontext()


class _NoCuda(TorchFunctionMode):
    """Turns ``device="cuda"``, ``.cuda()`` and ``pin_memory=True`` into their counterparts on another device."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device = device

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is torch.Tensor.cuda:
            return args[0]
        if not kwargs:
            return func(*args)
        if "device" in kwargs and _is_cuda(kwargs["device"]):
            kwargs = {**kwargs, "device": self._device}
        if kwargs.get("pin_memory"):
            kwargs = {**kwargs, "pin_memory": False}
        return func(*args, **kwargs)


def _is_cuda(device: Any) -> bool:
    return isinstance(device, (str, torch.device)) and torch.device(device).type == "cuda"

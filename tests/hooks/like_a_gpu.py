"""A device that is no CPU, on a machine without a GPU: which operations wait there, and what memory they take.

PyTorch's meta tensors have a shape and no content. They go through the same code as CUDA tensors, so also the branches
for a GPU are run, and PyTorch checks their shapes and types.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megascore.kernels import exact, products

__all__ = ["ELSEWHERE", "Watch", "like_a_gpu"]

ELSEWHERE = torch.device("meta")
ALWAYS_WAIT = {
    "_local_scalar_dense",
    "equal",
    "is_nonzero",
    "masked_select",
    "nonzero",
    "unique_consecutive",
    "unique_dim",
    "_unique",
    "_unique2",
}
"""Operators whose result's content or shape the host needs."""


class Watch(TorchDispatchMode):
    """Notes operations on such tensors for which the host waits, and the largest memory that was in use at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        self.in_use = self.peak = 0
        self._storages: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if _waits(func, args, kwargs):
            self.waits.append(str(func))
        result = func(*args, **kwargs)
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.device.type == "meta":
                self._note(tensor)
        return result

    def _note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, num_bytes = storage._cdata, storage.nbytes()
        if key in self._storages:
            return
        self.in_use += num_bytes
        self.peak = max(self.peak, self.in_use)
        self._storages[key] = weakref.finalize(storage, self._free, key, num_bytes)

    def _free(self, key: int, num_bytes: int) -> None:
        del self._storages[key]
        self.in_use -= num_bytes


def _waits(func: Any, args: Any, kwargs: Any) -> bool:
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    if not any(tensor.device.type == "meta" for tensor in tensors) and not _is_elsewhere(kwargs.get("device")):
        return False
    name = func._schema.name.removeprefix("aten::")
    if name in ALWAYS_WAIT:
        return True
    if name == "_to_copy":
        here, there = args[0].device.type, torch.device(kwargs.get("device") or args[0].device).type
        return here != there and not (kwargs.get("non_blocking") and there == "meta")
    if name == "copy_":
        here, there = args[1].device.type, args[0].device.type
        return here != there and not (there == "meta" and (args[2:3] == (True,) or kwargs.get("non_blocking")))
    if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
        return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
    if name == "repeat_interleave":
        return kwargs.get("output_size") is None
    return False


def _is_elsewhere(device: Any) -> bool:
    return device is not None and torch.device(device).type == "meta"


@contextmanager
def like_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let the meta device have what a GPU has: products of bfloat16 in float32, and autocast, which is off."""
    with monkeypatch.context() as patch, torch.no_grad():
        # As far as this torch offers it on a GPU.
        is_fast = products._is_fast(torch.device("cuda"))
        patch.setattr(products, "_is_fast", lambda device: is_fast)
        patch.setattr(exact, "_is_unrounded", lambda device: True)
        yield

"""Importing Megatron where torch is built for CUDA and there is no GPU."""

from __future__ import annotations

import pytest
import torch
from torch.utils import cpp_extension

from megascore.mcore.cpu.without_gpu import nothing_compiled_for_cuda


@pytest.mark.parametrize(("cuda", "gpu"), [("12.4", False), ("12.4", True), (None, False)])
def test_compiling_for_cuda_is_refused_only_where_it_cannot_work(
    cuda: str | None, gpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    before = cpp_extension.load_inline
    with nothing_compiled_for_cuda():
        if cuda is not None and not gpu:
            # The error at which Megatron does without.
            with pytest.raises(RuntimeError, match="no GPU to compile for"):
                cpp_extension.load_inline("name", "source", with_cuda=True)
        else:
            assert cpp_extension.load_inline is before
    assert cpp_extension.load_inline is before

"""The stand-in for triton, with which Megatron-Core 0.18 and later are imported on machines without it."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

from megascore.mcore.cpu.without_triton import triton_stand_in

pytestmark = pytest.mark.fast

KERNEL = """
import triton
import triton.language as tl
from triton.runtime.cache import FileCacheManager

@triton.autotune(configs=[triton.Config({"BLOCK": 4}, num_warps=2)], key=["n"])
@triton.jit
def kernel(x, n: tl.int32, BLOCK: tl.constexpr = 4): ...

def plain(): return 5
"""


@pytest.fixture
def _without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "triton"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr("megascore.mcore.cpu.without_triton.find_spec", lambda name: None)


@pytest.mark.usefixtures("_without_triton")
def test_kernels_can_be_defined_and_nothing_is_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "kernels_of_a_test.py").write_text(KERNEL)
    monkeypatch.syspath_prepend(tmp_path)
    with triton_stand_in():
        module = importlib.import_module("kernels_of_a_test")
    assert module.plain() == 5
    assert not any(name.partition(".")[0] == "triton" for name in sys.modules)
    sys.modules.pop("kernels_of_a_test")


@pytest.mark.usefixtures("_without_triton")
def test_it_is_gone_after_an_error() -> None:
    with pytest.raises(ImportError), triton_stand_in():
        raise ImportError
    assert "triton" not in sys.modules


def test_an_installed_triton_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = type(sys)("triton")
    monkeypatch.setitem(sys.modules, "triton", installed)
    with triton_stand_in():
        assert sys.modules["triton"] is installed
    assert sys.modules["triton"] is installed

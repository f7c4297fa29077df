"""The module ``transformer_engine_torch``: kernels that are there, and names that raise when they are called."""

from __future__ import annotations

import enum
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from tests.engine.shim import kernels

__all__ = ["make_extension"]


class _Missing(type):
    """A name of the real extension that is imported, annotated with or looked into, and never called.

    What is looked up in it are numbers, as in an enumeration, where no two are the same.
    """

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        number = sum(not known.startswith("__") for known in vars(cls))
        setattr(cls, name, number)
        return number

    def __call__(cls, *_: Any, **__: Any) -> Any:
        raise NotImplementedError(f"transformer_engine_torch.{cls.__name__} is not in tests/engine/shim/kernels.py")


class _Extension(ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        value = _Missing(name, (), {})
        setattr(self, name, value)
        return value


def make_extension(folder: Path) -> ModuleType:
    """Return the module, with the kernels of `kernels`, for the Transformer Engine in ``folder``."""
    module = _Extension("transformer_engine_torch")
    for value in (kernels.DType, *_attention_enums(folder)):
        setattr(module, value.__name__, value)
    for name in kernels.__all__:
        if name not in kernels.OF_THE_SHIM:
            setattr(module, name, getattr(kernels, name))
    return module


def _attention_enums(folder: Path) -> Iterator[type[enum.IntEnum]]:
    """Yield the extension's names for layouts, masks and kinds of fused attention, none of which is there.

    Versions differ in them, and newer ones check that they know all of them: so they are those that a version names.
    """
    members: dict[str, list[str]] = {}
    for source in sorted((folder / "transformer_engine" / "pytorch").rglob("*.py")):
        for name, member in re.findall(r"\b(NVTE_\w+)\.(NVTE_\w+)", source.read_text()):
            members.setdefault(name, []).append(member)
    assert "NVTE_Fused_Attn_Backend" in members, folder
    for name, found in members.items():
        yield enum.IntEnum(name, list(dict.fromkeys(found)), start=0)

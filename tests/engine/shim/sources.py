"""How modules of Transformer Engine are loaded that would not run on a CPU: three rules, for every version of it.

- Assertions that tensors are on a GPU, or that there is one, are left out, and what only raises otherwise.
- Its own kernels in Triton and its export to ONNX are modules of names only, as triton and onnxscript are not there.
- The function that loads the compiled extension does nothing: the shim has put one in its place already.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import ModuleType
from typing import Any

__all__ = ["SourceFinder"]

ASKS_FOR_CUDA = ("is_cuda", "is_available")
NOT_INSTALLED = re.compile(r"transformer_engine\.(common|pytorch)\.(triton|onnx_extensions)(\..*)?")


class SourceFinder(MetaPathFinder):
    """Finds modules of Transformer Engine, for a loader by the rules above."""

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: Any = None) -> ModuleSpec | None:
        """Return how to load a module; None: it is not Transformer Engine's."""
        if not name.startswith("transformer_engine."):
            return None
        if NOT_INSTALLED.fullmatch(name):
            return ModuleSpec(name, _NamesOnly(), is_package=True)
        spec = PathFinder.find_spec(name, path)
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = _Loader(spec.loader.name, spec.loader.path)
        return spec


class _Names(ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def missing(*_: Any, **__: Any) -> Any:
            raise NotImplementedError(f"{self.__name__}.{name} needs what is not installed beside the shim")

        return missing


class _NamesOnly(Loader):
    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _Names(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Nothing is in it."""


class _WithoutQuestions(ast.NodeTransformer):
    """Leaves out assertions about CUDA, and conditions that do nothing but raise without it."""

    def visit_Assert(self, node: ast.Assert) -> ast.AST:
        return self._without(node, node.test)

    def visit_If(self, node: ast.If) -> ast.AST:
        self.generic_visit(node)
        raises = len(node.body) == 1 and isinstance(node.body[0], ast.Raise) and not node.orelse
        return self._without(node, node.test) if raises else node

    @staticmethod
    def _without(node: ast.stmt, test: ast.expr) -> ast.AST:
        names = {part.attr for part in ast.walk(test) if isinstance(part, ast.Attribute)}
        return ast.copy_location(ast.Pass(), node) if names & set(ASKS_FOR_CUDA) else node


class _Loader(SourceFileLoader):
    def get_code(self, fullname: str) -> Any:
        """Return the code without the assertions; as it is, from the cache of bytecode, where there are none."""
        source = self.get_data(self.path)
        if not any(name.encode() in source for name in ASKS_FOR_CUDA):
            return super().get_code(fullname)
        return compile(_WithoutQuestions().visit(ast.parse(source)), self.path, "exec", dont_inherit=True)

    def exec_module(self, module: ModuleType) -> None:
        super().exec_module(module)
        if module.__name__ == "transformer_engine.common":
            module.load_framework_extension = lambda framework: None  # type: ignore[attr-defined]

"""Stands in for the compiled half of Transformer Engine, in processes that do nothing else.

Transformer Engine's wheel without binaries has all of its Python code. What that code calls is
``transformer_engine_torch``, an extension module of CUDA kernels: `extension` makes one of the few functions that a
forward pass and its gradients need, `kernels`, in plain PyTorch. All other names of it exist, and raise by name once
they are called. `sources` loads those of the package's modules differently that ask for CUDA or for what is not
installed, and `device` answers questions about the GPU.

The numerics of kernels are not tested by this: these ones are as exact as PyTorch, and take float64, which the real
ones don't.
"""

from __future__ import annotations

import os
import sys
from importlib import import_module
from pathlib import Path

from tests.engine.shim.device import stand_in_for_device
from tests.engine.shim.extension import make_extension
from tests.engine.shim.kernels import take_float64
from tests.engine.shim.sources import SourceFinder

__all__ = ["install"]

ENVIRONMENT = {
    # No look at what is installed, and no shared libraries.
    "NVTE_PROJECT_BUILDING": "1",
    # Softmax in PyTorch, and nothing compiled for a GPU. In float32 and float64 attention is the one in PyTorch anyway.
    "NVTE_MASKED_SOFTMAX_FUSION": "0",
    "NVTE_TORCH_COMPILE": "0",
}


def install(folder: Path) -> None:
    """Let this process import the Transformer Engine in ``folder``, and import it.

    It stays for the life of the process, and must come before the first import of Megatron, which asks once.

    Args:
        folder: Holds ``transformer_engine`` and its ``dist-info``, as ``pip install --target`` makes them.
    """
    loaded = {"megatron.core", "transformer_engine"} & sys.modules.keys()
    assert not loaded, f"{loaded} came before the shim"
    os.environ.update(ENVIRONMENT)
    sys.path.insert(0, str(folder))
    sys.meta_path.insert(0, SourceFinder())
    sys.modules["transformer_engine_torch"] = make_extension(folder)
    stand_in_for_device()
    engine = import_module("transformer_engine.pytorch")
    assert str(engine.__file__).startswith(str(folder)), engine.__file__
    take_float64(import_module("transformer_engine.pytorch.constants").TE_DType)

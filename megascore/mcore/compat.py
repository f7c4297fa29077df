"""Names that differ between the Megatron-Core versions that megascore supports, 0.16 to 0.19."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from megatron.core.models.gpt import gpt_layer_specs, gpt_model
from megatron.core.transformer import cuda_graphs
from megatron.core.transformer.moe import moe_utils

__all__ = [
    "has_transformer_engine",
    "missing_names",
    "replays_graphs",
    "runs_fused",
    "size_of_expert_output",
    "submodules_of",
    "without_deprecation_log",
]


def has_transformer_engine() -> bool:
    """Whether Transformer Engine is installed, and Megatron could import it."""
    return bool(gpt_layer_specs.HAVE_TE)


def replays_graphs(config: Any) -> bool:
    """Whether layers replay CUDA graphs that were captured in training, inside of which nothing calls a hook.

    Those of Transformer Engine are for training only, and no layer is in training while it is scored.
    """
    is_local = getattr(config, "cuda_graph_impl", "none") == "local" or getattr(config, "enable_cuda_graph", False)
    record = getattr(cuda_graphs, "_CudagraphGlobalRecord", None)
    return bool(is_local and getattr(record, "cudagraph_created", False))


def missing_names() -> list[tuple[Any, str, Any]]:
    """Return names that some versions use without defining them everywhere: (module, name, value to give it)."""
    # 0.16 asks for this one of Transformer Engine's also where that is not installed.
    return [(moe_utils, "te_general_gemm", getattr(moe_utils, "te_general_gemm", None))]


def size_of_expert_output(config: Any) -> int:
    """Return how many features a routed expert gives out for a token: those of the latent space, where there is one."""
    return int(getattr(config, "moe_latent_size", None) or config.hidden_size)


def runs_fused(module: Any) -> bool:
    """Whether an MLP or experts run as fused operations of Transformer Engine, past their own linear layers.

    Hooks on those are never called, or without tensors. A class of its own for dense MLPs; from 0.18 on also a way in
    which grouped experts run, and from 0.19 on shared ones.
    """
    return (
        hasattr(module, "_fused_impl")
        or bool(getattr(module, "_with_fused_impl", False))
        or hasattr(module, "_fused_grouped_swiglu_ops")
    )


def submodules_of(spec: Any) -> Any:
    """Return what the layers inside a layer spec are built of, to be looked at or changed.

    Up to 0.16 every spec is a ``ModuleSpec``; from 0.17 on some are a ``functools.partial`` of the class.
    """
    return spec.submodules if hasattr(spec, "submodules") else spec.keywords["submodules"]


@contextmanager
def without_deprecation_log() -> Iterator[None]:
    """Leave out what 0.19 logs for each model that is built: that new features go into another class."""

    def is_of_use(record: logging.LogRecord) -> bool:
        return "GPTModel IS DEPRECATED" not in str(record.msg)

    logger = logging.getLogger(gpt_model.__name__)
    logger.addFilter(is_of_use)
    try:
        yield
    finally:
        logger.removeFilter(is_of_use)

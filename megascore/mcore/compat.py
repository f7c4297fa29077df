"""Names that differ between the Megatron-Core versions that megascore supports, 0.15 to 0.19."""

from __future__ import annotations

from importlib.util import find_spec

from megatron.core.transformer import utils as transformer_utils

__all__ = ["forget_cached_masks", "has_transformer_engine"]


def forget_cached_masks() -> None:
    """Drop attention masks that 0.15 keeps by sequence length alone, whatever device they are on."""
    for name in ("get_default_causal_mask", "get_sliding_window_causal_mask"):
        clear = getattr(getattr(transformer_utils, name), "cache_clear", None)
        if clear is not None:
            clear()


def has_transformer_engine() -> bool:
    """Whether Transformer Engine is installed."""
    return find_spec("transformer_engine") is not None

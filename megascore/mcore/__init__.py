"""Megatron-Core: the only room of megascore that imports it. Imported only where Megatron is in use."""

from __future__ import annotations

import warnings

with warnings.catch_warnings():
    # Megatron says on import, once for each module, that apex and Transformer Engine are not there. They are optional.
    warnings.filterwarnings("ignore", message=".*(Apex|Transformer Engine).*", category=UserWarning)
    import megatron.core.models.gpt.gpt_layer_specs  # noqa: F401

from megascore.mcore.hooks import MegatronBlockSimilarityHook, MegatronL2NormHook

__all__ = ["MegatronBlockSimilarityHook", "MegatronL2NormHook"]

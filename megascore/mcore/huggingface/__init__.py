"""Hugging Face checkpoints as Megatron models: their config.json, which tensor goes where, reading a rank's share."""

from __future__ import annotations

from megascore.mcore.huggingface.config import HuggingFaceModelConfig, read_config
from megascore.mcore.huggingface.load import load_weights

__all__ = ["HuggingFaceModelConfig", "load_weights", "read_config"]

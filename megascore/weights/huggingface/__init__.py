"""Hugging Face checkpoints: their config.json, and which tensor makes up which Megatron parameter."""

from __future__ import annotations

from megascore.weights.huggingface.config import HuggingFaceModelConfig, read_config

__all__ = ["HuggingFaceModelConfig", "read_config"]

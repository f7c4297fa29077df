"""Hugging Face checkpoints: their config.json, their safetensors files, and the table of their tensors."""

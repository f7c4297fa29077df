"""Checkpoints of models, read without Megatron: Hugging Face folders and Megatron's torch_dist."""

"""Megatron checkpoints of the torch_dist format, read without running their pickles."""

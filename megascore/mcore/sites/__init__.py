"""Megatron models as scoring sees them: places, roles of parallel axes, hooks."""

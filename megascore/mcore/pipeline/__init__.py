"""Micro-batches through Megatron's pipeline schedules, whole or layer by layer."""

"""Megatron models: built in any layout, and filled with weights from wherever they are."""

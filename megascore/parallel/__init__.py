"""Parallel axes, their roles, and merging over them. Needs PyTorch alone."""

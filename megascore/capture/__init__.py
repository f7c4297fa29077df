"""Capture of the inputs of a model's blocks, so that each block can be run alone. Needs PyTorch and nothing else."""

from __future__ import annotations

from megascore.capture.block_inputs import BlockInputCapture, capture_block_inputs
from megascore.capture.calls import BlockCall, StoredCalls
from megascore.capture.nested import nested_move_to
from megascore.capture.stores import DeviceStore, HostStore, SpoolStore, TensorStore

__all__ = [
    "BlockCall",
    "BlockInputCapture",
    "DeviceStore",
    "HostStore",
    "SpoolStore",
    "StoredCalls",
    "TensorStore",
    "capture_block_inputs",
    "nested_move_to",
]

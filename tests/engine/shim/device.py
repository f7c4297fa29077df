"""Answers of ``torch.cuda`` for a machine without a GPU, where Transformer Engine asks while it is imported and run."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

__all__ = ["stand_in_for_device"]

CAPABILITY = (9, 0)
"""That of an H100: older ones have other paths through the package's code."""


def stand_in_for_device() -> None:
    """Answer for the life of this process; the rest is the CPU stand-in's of `megascore.mcore.cpu`."""
    answers: dict[str, Any] = {
        "is_current_stream_capturing": lambda: False,
        "get_device_capability": lambda device=None: CAPABILITY,
        "get_device_properties": lambda device=None: SimpleNamespace(
            name="CPU", major=CAPABILITY[0], minor=CAPABILITY[1], multi_processor_count=1, total_memory=1 << 34
        ),
    }
    for name, answer in answers.items():
        setattr(torch.cuda, name, answer)

"""A whole model in Megatron's terms, whatever its layout and wherever its weights come from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

__all__ = ["Architecture", "Experts"]


@dataclass(frozen=True)
class Experts:
    """Sizes of routed experts."""

    num_experts: int
    ffn_size: int
    """Channels inside each expert."""
    layers: tuple[bool, ...]
    """Which layers have experts; the others have a dense MLP."""


@dataclass(frozen=True)
class Architecture:
    """A decoder that Megatron-Core's ``GPTModel`` can be."""

    model_type: str
    """Name of the model in messages."""
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    ffn_size: int
    """Channels inside a dense MLP."""
    vocab_size: int
    """Tokens; rows by which a layout or a checkpoint pads the embedding are none."""
    max_positions: int
    """Longest sequence; rotary positions go on beyond it, learned ones do not."""
    sliding_window: int | None = None
    """Keys that a query sees, itself included, in the layers of `sliding_layers`; None where all see everything."""
    sliding_layers: tuple[bool, ...] = ()
    experts: Experts | None = None
    transformer: Mapping[str, Any] = field(default_factory=dict)
    """Further arguments of Megatron's ``TransformerConfig``, none that says how the model is split."""
    gpt: Mapping[str, Any] = field(default_factory=dict)
    """Further arguments of Megatron's ``GPTModel``, none that says which part of the model this is."""

    def as_json(self) -> dict[str, Any]:
        """Return all of it as JSON has it, functions and types by their names."""
        text = json.dumps(asdict(self), default=lambda value: getattr(value, "__qualname__", None) or str(value))
        plain: dict[str, Any] = json.loads(text)
        return plain

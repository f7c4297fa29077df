"""Numbers of heads that share an attention output projection: the layer in hand says them, then the config."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from megascore.errors import ModelError

__all__ = ["Heads", "check_kv_heads", "config_kv_heads", "plain_heads", "width_of_head"]


@dataclass(frozen=True)
class Heads:
    """The heads of one attention."""

    num_heads: int
    num_kv_heads: int | None
    """None where keys and values are no heads that query heads share, as in multi-latent attention."""


def plain_heads(name: str, attention: nn.Module, num_inputs: int, config: Any) -> Heads:
    """Return the heads of a Hugging Face attention.

    Args:
        name: Global name of its output projection, for errors.
        attention: The module.
        num_inputs: Inputs of the output projection.
        config: The model's, asked for what the module does not say.

    Raises:
        ModelError: the numbers contradict each other.
    """
    width = _number(attention, "v_head_dim", "head_dim", "attention_head_size")
    num_heads = _number(attention, "num_heads", "num_attention_heads")
    if num_heads is None:
        num_heads = int(config.num_attention_heads) if width is None else num_inputs // width
    width = width_of_head(name, num_inputs, num_heads, width)
    num_kv_heads = _plain_kv_heads(attention, num_heads, width, config)
    if num_kv_heads is not None:
        check_kv_heads(name, num_heads, num_kv_heads)
    return Heads(num_heads, num_kv_heads)


def width_of_head(name: str, num_inputs: int, num_heads: int, width: int | None = None) -> int:
    """Return how many inputs of a projection belong to one head.

    Args:
        name: Of the projection, for errors.
        num_inputs: All of them.
        num_heads: Heads that share them.
        width: What the attention says; None where it doesn't.

    Raises:
        ModelError: the heads can't share the inputs equally, or not with this width.
    """
    if num_heads < 1 or num_inputs % num_heads or width not in (None, num_inputs // num_heads):
        of_width = "" if width is None else f" of {width}"
        raise ModelError(
            f"{name} has {num_inputs} inputs, which are not those of {num_heads} heads{of_width} as its attention or "
            "the model's config says: bring the two together."
        )
    return num_inputs // num_heads


def check_kv_heads(name: str, num_heads: int, num_kv_heads: int) -> None:
    """Refuse KV heads that the query heads can't share equally.

    Raises:
        ModelError: naming both numbers.
    """
    if num_kv_heads < 1 or num_heads % num_kv_heads:
        raise ModelError(f"{name}: {num_heads} query heads can't share {num_kv_heads} KV heads equally.")


def config_kv_heads(config: Any) -> int | None:
    """Return what a Hugging Face config says; None where it says nothing, and each query head has its own."""
    number = getattr(config, "num_key_value_heads", None)
    return None if number is None else int(number)


def _plain_kv_heads(attention: nn.Module, num_heads: int, width: int, config: Any) -> int | None:
    children = dict(attention.named_children())
    if "kv_b_proj" in children:
        return None
    own = next((children[name] for name in ("v_proj", "value", "k_proj") if name in children), None)
    outputs = getattr(own, "out_features", None)
    if outputs is None and "qkv_proj" in children:
        fused = getattr(children["qkv_proj"], "out_features", None)
        outputs = None if fused is None else (fused - num_heads * width) // 2
    if outputs is None:
        return config_kv_heads(config) or num_heads
    # What does not divide is no number of heads; the check that follows says so.
    return outputs // width if outputs % width == 0 else 0


def _number(module: nn.Module, *names: str) -> int | None:
    found = (getattr(module, name, None) for name in names)
    return next((value for value in found if isinstance(value, int) and value > 0), None)

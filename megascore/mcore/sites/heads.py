"""Numbers of heads of a Megatron attention, on all ranks together: the layer in hand says them, then its config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron.core.transformer.multi_latent_attention import MultiLatentAttention
from torch import nn

from megascore.errors import HookStateError
from megascore.sites.heads import Heads, check_kv_heads, width_of_head

__all__ = ["kv_heads_of_projection", "megatron_heads"]


def megatron_heads(name: str, attention: Any, model_config: Any, num_inputs: int, tensor_size: int) -> Heads:
    """Return the heads of an attention, which may be other ones than the model's config says.

    Args:
        name: Global name of its output projection, for errors.
        attention: The module.
        model_config: Of the model, for an attention without a config of its own.
        num_inputs: Inputs of the output projection, on all ranks.
        tensor_size: Tensor-parallel ranks.

    Raises:
        ModelError: the numbers contradict each other.
    """
    config = getattr(attention, "config", None) or model_config
    num_kv_heads = int(config.num_query_groups or config.num_attention_heads)
    # With fewer KV heads than ranks, Megatron's numbers of a partition are those of one KV head.
    parts = min(num_kv_heads, tensor_size)
    own_heads = getattr(attention, "num_attention_heads_per_partition", None)
    own_kv_heads = getattr(attention, "num_query_groups_per_partition", None)
    num_heads = int(config.num_attention_heads) if own_heads is None else int(own_heads) * parts
    width_of_head(name, num_inputs, num_heads, getattr(attention, "val_hidden_size", None))
    if isinstance(attention, MultiLatentAttention):
        return Heads(num_heads, None)
    num_kv_heads = num_kv_heads if own_kv_heads is None else int(own_kv_heads) * parts
    check_kv_heads(name, num_heads, num_kv_heads)
    return Heads(num_heads, num_kv_heads)


def kv_heads_of_projection(linear: nn.Module, given: Mapping[str, Any], num_inputs: int, tensor_size: int) -> int:
    """Return the KV heads, on all ranks, of an attention output projection.

    The attention that it belongs to says so, where ``model`` has it; then ``block_config``; then the projection's own
    config, which may be that of the whole model.

    Args:
        linear: The projection.
        given: ``model`` and ``block_config``, with ``attention.num_key_value_heads``, as the published hook takes
            them; each may be missing.
        num_inputs: Inputs of the projection, on all ranks.
        tensor_size: Tensor-parallel ranks.

    Raises:
        HookStateError: nothing says it, or what is given contradicts the attention.
        ModelError: heads can't share the projection's inputs equally.
    """
    attention = _attention_of(linear, given.get("model"))
    said: dict[str, int | None] = {}
    if attention is not None:
        of_model = getattr(linear, "config", None)
        heads = megatron_heads("linear_proj", attention, of_model, num_inputs, tensor_size)
        said["the attention"] = heads.num_kv_heads
    if given.get("block_config") is not None:
        of_block = getattr(given["block_config"], "attention", None)
        said["block_config"] = getattr(of_block, "num_key_value_heads", None)
    elif attention is None:
        said["the config of the projection"] = getattr(getattr(linear, "config", None), "num_query_groups", None)
    numbers = {source: int(number) for source, number in said.items() if number}
    if len(numbers) < len(said) or len(set(numbers.values())) != 1:
        told = " and ".join(f"{source} has {number or 'none'}" for source, number in said.items())
        raise HookStateError(
            f"KV heads of {type(linear).__name__}: {told}. Give 'block_config' with .attention.num_key_value_heads, "
            "the same as the attention's where 'model' has it."
        )
    num_kv_heads = next(iter(numbers.values()))
    width = _head_size(getattr(given.get("model"), "config", None) or getattr(linear, "config", None))
    if attention is None and width is not None:
        num_heads = num_inputs // width
        width_of_head("linear_proj", num_inputs, num_heads, width)
        check_kv_heads("linear_proj", num_heads, num_kv_heads)
    return num_kv_heads


def _head_size(config: Any) -> int | None:
    """Return the size of a head from a config of Hugging Face or Megatron; None from one that says nothing of it."""
    sizes = (getattr(config, name, None) for name in ("v_head_dim", "head_dim", "kv_channels"))
    size = next((size for size in sizes if size), None)
    heads, hidden = (getattr(config, name, None) for name in ("num_attention_heads", "hidden_size"))
    return int(size) if size else int(hidden) // int(heads) if heads and hidden else None


def _attention_of(linear: nn.Module, model: Any) -> nn.Module | None:
    modules = model.modules() if isinstance(model, nn.Module) else ()
    return next((module for module in modules if getattr(module, "linear_proj", None) is linear), None)

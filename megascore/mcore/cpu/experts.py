"""Mixture-of-experts layers on a machine without CUDA: no Transformer Engine, and gloo instead of NCCL."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer.moe import shared_experts, token_dispatcher
from torch import Tensor

from megascore.mcore.compat import missing_names

__all__ = ["expert_replacements"]


def expert_replacements() -> list[tuple[Any, str, Any]]:
    """Return the names to be given other values meanwhile: (module or class, name, value)."""
    return [
        *missing_names(),
        # Streams that the classes keep for all their instances.
        (token_dispatcher.MoEAlltoAllTokenDispatcher, "cuda_dtoh_stream", None),
        (shared_experts.SharedExpertMLP, "stream", None),
        (token_dispatcher, "all_to_all", _all_to_all(token_dispatcher.all_to_all)),
        *[
            (token_dispatcher, name, wrap(getattr(token_dispatcher, name)))
            for name, wrap in _UNEVEN.items()
            if hasattr(token_dispatcher, name)
        ],
    ]


def _all_to_all(original: Callable[..., Any]) -> Callable[..., Any]:
    """Take sizes of splits as tensors, as they stay on the CPU, where gloo takes lists only."""

    def wrapped(group: Any, tokens: Tensor, *splits: Any, **options: Any) -> Any:
        return original(group, tokens, *(s.tolist() if isinstance(s, Tensor) else s for s in splits), **options)

    return wrapped


def _gather(original: Callable[..., Any]) -> Callable[..., Any]:
    """Gather different numbers of tokens from the ranks, which gloo cannot, by sending each rank all of one's own."""

    def wrapped(tokens: Tensor, *args: Any, output_split_sizes: Sequence[int] | None = None, **kwargs: Any) -> Any:
        if output_split_sizes is None:
            return original(tokens, *args, **kwargs)
        group = kwargs["group"]
        copies = [tokens] * len(output_split_sizes)
        gathered = tokens.new_empty(sum(output_split_sizes), *tokens.shape[1:])
        dist.all_to_all_single(gathered, torch.cat(copies), list(output_split_sizes), [*map(len, copies)], group=group)
        return gathered

    return wrapped


def _reduce_scatter(original: Callable[..., Any]) -> Callable[..., Any]:
    """Give the ranks different numbers of tokens of a sum, which gloo cannot, by adding up all of them everywhere."""

    def wrapped(tokens: Tensor, *args: Any, input_split_sizes: Sequence[int] | None = None, **kwargs: Any) -> Any:
        if input_split_sizes is None:
            return original(tokens, *args, **kwargs)
        group = kwargs["group"]
        summed = tokens.clone()
        dist.all_reduce(summed, group=group)
        return summed.split(list(input_split_sizes))[group.rank()]  # type: ignore[no-untyped-call]

    return wrapped


_UNEVEN = {
    "gather_from_sequence_parallel_region": _gather,
    "reduce_scatter_to_sequence_parallel_region": _reduce_scatter,
}

"""Context parallelism: which tokens a rank has, and an attention for machines without Transformer Engine."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn import functional

__all__ = ["GatheringAttention", "local_positions"]


def local_positions(sequence_length: int, rank: int, size: int, device: torch.device | str = "cpu") -> Tensor:
    """Return the positions in the sequence of a context-parallel rank's tokens, ascending: [sequence_length / size].

    Megatron cuts a sequence into twice as many chunks as there are ranks, and gives each rank one from the front and
    one from the back, so that all have as much to do under a causal mask.
    """
    positions = torch.arange(sequence_length, device=device)
    if size == 1:
        return positions
    chunks = positions.chunk(2 * size)
    return torch.cat([chunks[rank], chunks[2 * size - 1 - rank]])


class GatheringAttention(MegatronModule):  # type: ignore[misc]
    """Causal core attention under context parallelism that gathers keys and values of the whole sequence.

    Megatron's own needs Transformer Engine's. This one is for machines without it: simple, exact in any dtype, and no
    faster than one rank.
    """

    def __init__(
        self,
        config: TransformerConfig,
        *_: Any,
        softmax_scale: float | None = None,
        pg_collection: Any = None,
        **__: Any,
    ) -> None:
        """Build; takes the arguments of Megatron's core attentions, and has no weights."""
        super().__init__(config=config)
        self.softmax_scale = softmax_scale
        self.cp_group = pg_collection.cp

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
        """Attend over the whole sequence. Collective over the context-parallel ranks.

        Args:
            query: [S / CP, B, heads, head_dim], this rank's tokens.
            key: [S / CP, B, kv_heads, head_dim].
            value: [S / CP, B, kv_heads, head_dim].

        Returns:
            [S / CP, B, heads * head_dim].
        """
        size = dist.get_world_size(self.cp_group)
        gather: Any = _GatherSequence.apply
        keys, values = gather(key, self.cp_group), gather(value, self.cp_group)
        length = query.shape[0] * size
        by_rank = [local_positions(length, rank, size, query.device) for rank in range(size)]
        own, all_positions = by_rank[dist.get_rank(self.cp_group)], torch.cat(by_rank)
        output = functional.scaled_dot_product_attention(
            query.permute(1, 2, 0, 3),
            keys.permute(1, 2, 0, 3),
            values.permute(1, 2, 0, 3),
            attn_mask=own[:, None] >= all_positions[None, :],
            scale=self.softmax_scale,
            enable_gqa=True,
        )
        return output.permute(2, 0, 1, 3).flatten(2)


class _GatherSequence(torch.autograd.Function):
    """Gathers parts of a sequence of all ranks of a group; back go the gradients of each rank's part, added up."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
        """Return the parts of all ranks behind one another. Collective over the group."""
        ctx.group = group
        size = dist.get_world_size(group)
        parts = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(size)]
        dist.all_gather(parts, tensor.contiguous(), group=group)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        """Return the gradient of this rank's part. Collective over the group."""
        # A copy, for what autograd hands over may be another node's, too.
        whole = gradients[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(whole, group=ctx.group)
        return whole.chunk(dist.get_world_size(ctx.group))[dist.get_rank(ctx.group)], None

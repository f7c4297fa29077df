"""Token masks on this rank: which of a batch's tokens count, where other ranks have other parts of the sequences.

A mask is given for whole sequences, [B, S]. Megatron's activations are sequence first, and a rank may have a part of
the sequence, or, inside routed experts, tokens of many ranks in the order of their experts.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.token_dispatcher import MoEAllGatherTokenDispatcher, MoEAlltoAllTokenDispatcher
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from megascore.errors import HookStateError, ModelError
from megascore.mcore.world.context_parallel import local_positions
from megascore.parallel.axes import Axis
from megascore.sites.places import LocalMask, mask_mismatch

__all__ = ["DispatchedMask", "SequenceMask", "rows_of_expert"]


class SequenceMask:
    """A `LocalMask` of activations [S, B, C] that hold this rank's part of the sequence."""

    def __init__(self, context: Axis, sequence: Axis | None = None) -> None:
        """Take the axes that split the sequence here.

        Args:
            context: The context-parallel axis.
            sequence: The tensor-parallel axis where sequence parallelism splits what context parallelism leaves.
        """
        self._context = context
        self._sequence = sequence or Axis("tp", 0, 1)
        self._last: tuple[Tensor, torch.Size, Tensor] | None = None

    def __call__(self, mask: Tensor, activations: Tensor) -> Tensor:
        """Return the mask [S here, B] of activations [S here, B, C].

        ``mask`` may also hold this context-parallel rank's tokens alone, in Megatron's order: the length tells.

        Raises:
            DataError: the mask is of another batch.
        """
        shape = activations.shape[:2]
        # The same for all layers, and a run never changes a mask in place.
        if self._last is None or self._last[0] is not mask or self._last[1] != shape:
            self._last = (mask, shape, self._local(mask, activations))
        return self._last[2]

    def _local(self, mask: Tensor, activations: Tensor) -> Tensor:
        parts = self._context.size * self._sequence.size
        if activations.dim() != 3:
            raise mask_mismatch(mask, activations, parts)
        length, num_samples = activations.shape[0] * self._sequence.size, activations.shape[1]
        if mask.shape == (num_samples, length * self._context.size):
            positions = local_positions(mask.shape[1], self._context.rank, self._context.size, mask.device)
            mask = mask[:, positions]
        elif mask.shape != (num_samples, length):
            raise mask_mismatch(mask, activations, parts)
        return mask.T.chunk(self._sequence.size)[self._sequence.rank].contiguous()


class DispatchedMask:
    """Which of the tokens that a layer's experts get do count.

    The mask is sent through the layer's own token dispatcher, with the routing of the tokens themselves, before they
    are: so it arrives in their order, whatever that is. This costs the messages of a model with one hidden feature,
    and those of the router's weights a second time; nothing where no mask is set.
    """

    def __init__(self, moe_layer: MoELayer, name: str, local_mask: LocalMask) -> None:
        """Keep what is needed; not collective.

        Args:
            moe_layer: The layer.
            name: Its global name, for errors.
            local_mask: The mask of the hidden states that the layer is given.
        """
        self._layer: Any = moe_layer
        self._name = name
        self._local_mask = local_mask
        self._sent: tuple[Tensor, Tensor, Any] | None = None

    def follow(self, current_mask: Callable[[], Tensor | None]) -> RemovableHandle:
        """Send each mask once the router has decided, until the handle is removed.

        The forward pass is then collective over the ranks that exchange tokens where a mask is set: on all or on none.
        """

        def send(_router: object, args: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
            mask = current_mask()
            if mask is not None:
                with torch.no_grad():
                    self._send(mask.to(args[0].device), args[0], *output)

        handle: RemovableHandle = self._layer.router.register_forward_hook(send)
        return handle

    def of_layer(self, mask: Tensor, activations: Tensor) -> Tensor:
        """Return the mask [T] of all tokens that this rank's experts get; a `LocalMask`.

        Raises:
            HookStateError: the router has not run with this mask.
        """
        return self._arrived(mask)[0]

    def of_expert(self, position: int) -> LocalMask:
        """Return the `LocalMask` of the tokens of one of this rank's experts."""

        def local_mask(mask: Tensor, activations: Tensor) -> Tensor:
            arrived, counts = self._arrived(mask)
            return arrived[rows_of_expert(position, counts)]

        return local_mask

    def _send(self, mask: Tensor, hidden_states: Tensor, weights: Tensor, routing_map: Tensor) -> None:
        dispatcher = self._layer.token_dispatcher
        if not isinstance(dispatcher, (MoEAllGatherTokenDispatcher, MoEAlltoAllTokenDispatcher)):
            raise ModelError(
                f"{self._name}: a token mask cannot be sent through {type(dispatcher).__name__}. Set "
                "moe_token_dispatcher_type to 'alltoall' or 'allgather' in the TransformerConfig, or leave experts "
                "out of the scores."
            )
        column = self._local_mask(mask, hidden_states).to(hidden_states.dtype).contiguous().unsqueeze(-1)
        # A copy, for a dispatcher keeps what it needs for the way back.
        messenger: Any = copy.copy(dispatcher)
        messenger.shared_experts = None
        tokens, weights = messenger.dispatch_preprocess(column, routing_map, weights)
        arrived, counts, _ = messenger.dispatch_postprocess(*messenger.token_dispatch(tokens, weights))
        self._sent = (mask, arrived.squeeze(-1) > 0, counts)

    def _arrived(self, mask: Tensor) -> tuple[Tensor, Any]:
        if self._sent is None or self._sent[0] is not mask:
            raise HookStateError(
                f"{self._name}: its router has not run since the token mask was set, so it is unknown which tokens of "
                "its experts count. Set the mask before the forward pass."
            )
        return self._sent[1:]


def rows_of_expert(position: int, counts: Any) -> slice:
    """Return the rows of one local expert where rows are sorted by expert.

    Args:
        position: Of the expert on this rank.
        counts: Tokens of each local expert, a list or an int64 tensor on the CPU.
    """
    numbers = counts.tolist() if isinstance(counts, Tensor) else counts
    start = sum(numbers[:position])
    return slice(start, start + numbers[position])

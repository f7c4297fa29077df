"""Feeds: inputs of blocks that run alone, and the feed that gets them by fresh passes through the model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from megascore.blockwise.moving_weights import MovingWeights
from megascore.blockwise.stand_ins import forwards_replaced
from megascore.capture.block_inputs import BlockInputCapture
from megascore.capture.calls import BlockCall, StoredCalls
from megascore.capture.stores import TensorStore
from megascore.errors import ModelError

__all__ = ["BlockFeed", "Forward", "FreshFeed"]

Forward = Callable[[int], object]
"""Runs the whole model on the batch of this number."""

REPEATED = "a block that a model shares between layers, or runs again, cannot be scored alone"


class BlockFeed(ABC):
    """Gives each block its inputs, block after block, for a number of batches."""

    def __init__(
        self,
        model: nn.Module,
        blocks: Sequence[nn.Module],
        num_batches: int,
        forward: Forward,
        weights: MovingWeights,
        store: TensorStore,
    ) -> None:
        """Prepare; nothing runs yet.

        Args:
            model: The model that ``forward`` runs.
            blocks: Its blocks, each once, in the order in which it calls them.
            num_batches: ``forward`` is called with numbers below it.
            forward: Runs the model on one batch.
            weights: Brings weights to the compute device.
            store: Where inputs wait.
        """
        self._model = model
        self._blocks = blocks
        self._num_batches = num_batches
        self._forward = forward
        self._weights = weights
        self._store = store
        self._calls = StoredCalls(store, weights.device)

    @abstractmethod
    def prepare(self, number: int) -> None:
        """Get ready for a block; blocks come in order, and may be left out where `needs_every_block` is false."""

    @abstractmethod
    def call(self, number: int, index: int) -> BlockCall:
        """Return the arguments of a block for a batch, on the compute device; can be repeated."""

    def keep(self, number: int, index: int, output: Any) -> None:  # noqa: B027 - not all need it
        """Take over what a block returned for a batch, after which its inputs may be gone."""

    needs_every_block: bool
    """Whether a block must run for the sake of those after it."""

    @abstractmethod
    @contextmanager
    def whole_passes(self) -> Iterator[Forward]:
        """Give a function that runs the model on a batch so that what is outside of blocks gets its right inputs.

        After the last block.
        """

    def close(self) -> None:
        """Drop everything from the store."""
        self._calls.truncate(0)


class FreshFeed(BlockFeed):
    """Each block's inputs come from a pass through the model, halted at it: any model, and more to compute."""

    needs_every_block = False

    def prepare(self, number: int) -> None:
        """Run the model up to the block, for every batch."""
        self._calls.truncate(0)
        capture = BlockInputCapture(self._blocks[number], store=self._store, device=self._weights.device)
        self._calls = capture.inputs
        with self._weights.on_call(self._model, self._blocks, blocks_run=True), capture:
            for index in range(self._num_batches):
                capture.run(self._forward, index)

    def call(self, number: int, index: int) -> BlockCall:
        """Return what was captured."""
        return self._calls[index]

    @contextmanager
    def whole_passes(self) -> Iterator[Forward]:
        """Run all of the model.

        Raises:
            ModelError: a block runs several times in a pass, of which only the first was captured.
        """
        self._calls.truncate(0)
        reached: set[int] = set()

        def run_block(number: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            if number in reached:
                raise ModelError(f"block {number} is reached twice in a forward pass: {REPEATED}.")
            reached.add(number)
            return forward(*args, **kwargs)

        def run_whole(index: int) -> object:
            reached.clear()
            return self._forward(index)

        on_call = self._weights.on_call(self._model, self._blocks, blocks_run=True)
        with on_call, forwards_replaced(self._blocks, run_block):
            yield run_whole

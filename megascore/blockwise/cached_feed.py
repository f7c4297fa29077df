"""Feeding each block what the block before it returned."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from megascore.blockwise.feeds import REPEATED, BlockFeed, Forward
from megascore.blockwise.stand_ins import ReturnForm, forwards_replaced, hidden_states_of
from megascore.capture.block_inputs import Halt
from megascore.capture.caches import refuse_caches
from megascore.capture.calls import BlockCall
from megascore.capture.nested import nested_leaves
from megascore.errors import ModelError

__all__ = ["CachedFeed"]

OTHER_MODE = "use cache_block_outputs=False, which takes each block's inputs from a pass through the real ones"


class CachedFeed(BlockFeed):
    """Each block's hidden states are what the block before returned: every block runs once for each batch.

    All other arguments are those that the model passes to this block. They are taken from one pass in which blocks
    only hand a mark through, so they must not depend on what blocks compute, and the model must not touch hidden states
    between blocks. Both are checked: the mark is a tensor of NaN, which comes out as NaN in whatever is made of it.
    """

    needs_every_block = True

    def __init__(self, *args: Any, form: ReturnForm | None = None, **kwargs: Any) -> None:
        """Prepare; see `BlockFeed`.

        Args:
            args: As of `BlockFeed`.
            form: What all blocks return; otherwise the first of each class tells, by running once.
            kwargs: As of `BlockFeed`.
        """
        super().__init__(*args, **kwargs)
        self._known_form = form
        self._forms: dict[type[nn.Module], ReturnForm] = {}
        self._shapes: dict[int, torch.Size] = {}
        self._index = 0
        self._num_reached = 0
        self._mark = torch.empty(0)
        self._last_form: ReturnForm
        self._checked: list[Tensor] = []

    def prepare(self, number: int) -> None:
        """Before the first block: collect the arguments of all of them.

        Raises:
            ModelError: a block is not reached, or out of order, or what it is given depends on blocks before it.
        """
        if number or len(self._calls):
            return
        with self.collecting() as collect:
            for index in range(self._num_batches):
                collect(index)

    @contextmanager
    def collecting(self) -> Iterator[Callable[[int], None]]:
        """Give a function that collects the arguments of all blocks for one batch: to be called for each, in order.

        What `prepare` does at once, for who must do other things in between. The function raises as `prepare` does.
        """
        on_call = self._weights.on_call(self._model, self._blocks, blocks_run=False)
        with on_call, forwards_replaced(self._blocks, self._hand_through):
            yield self._collect

    def hidden_states(self, index: int) -> Tensor:
        """Return a batch's hidden states as the last block that ran left them, on the compute device."""
        return self._store.get(self._key(index), self._weights.device)

    def drop_hidden_states(self, index: int) -> None:
        """Free a batch's hidden states, when all blocks are done with them."""
        self._store.drop(self._key(index))

    def _collect(self, index: int) -> None:
        self._index, self._num_reached = index, 0
        try:
            self._forward(index)
        except Halt as halt:
            halt.catch(self)
            return
        finally:
            self._calls.forget_identities()
            self._checked.clear()
        raise ModelError(
            f"the forward pass of batch {index} reached {self._num_reached} of {len(self._blocks)} blocks and ended "
            f"without block {self._num_reached}: give the blocks that the model uses for every batch."
        )

    def _hand_through(self, number: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Keep the arguments of a block, and return the mark in its place."""
        call = BlockCall(args, kwargs)
        refuse_caches(call)
        self._check_order(number)
        if number == 0:
            self._shapes[self._index] = call.hidden_states.shape
            self._store.put(self._key(self._index), call.hidden_states)
            self._mark = torch.full_like(call.hidden_states, float("nan"))
        else:
            self._check_independent(number, call)
        self._calls.append(call, hidden_key=self._key(self._index))
        self._num_reached += 1
        if self._num_reached == len(self._blocks):
            raise Halt(self)
        return self._form(number, forward, call).filled(self._mark)

    def _form(self, number: int, forward: Callable[..., Any], call: BlockCall) -> ReturnForm:
        """Return what blocks of this class return, which the first of them tells by running once."""
        if self._known_form is not None:
            return self._known_form
        block = self._blocks[number]
        if type(block) not in self._forms:
            # Real numbers in place of the mark, which a router, say, would choke on.
            real = call if number == 0 else call.with_hidden_states(torch.zeros_like(call.hidden_states))
            with self._weights.present(block):
                self._forms[type(block)] = ReturnForm(forward(*real.args, **real.kwargs))
        return self._forms[type(block)]

    def _check_order(self, number: int) -> None:
        if number != self._num_reached:
            raise ModelError(
                f"the forward pass came to block {number} when block {self._num_reached} was the next: give each block "
                "once, in the order in which the model runs them."
            )

    def _check_independent(self, number: int, call: BlockCall) -> None:
        if call.hidden_states is not self._mark:
            raise ModelError(
                f"the model changes hidden states between block {number - 1} and block {number}: {OTHER_MODE}."
            )
        for tensor in nested_leaves(call.with_hidden_states(None), Tensor):
            if any(tensor is checked for checked in self._checked):
                continue
            if tensor.is_floating_point() and tensor.isnan().any():
                raise ModelError(
                    f"an argument of block {number} ({_where(call, tensor)}) depends on what blocks before it return: "
                    f"{OTHER_MODE}."
                )
            self._checked.append(tensor)

    def call(self, number: int, index: int) -> BlockCall:
        """Return the block's arguments, with the hidden states of the block before."""
        return self._calls[index * len(self._blocks) + number]

    def keep(self, number: int, index: int, output: Any) -> None:
        """Store the hidden states for the next block.

        Raises:
            ModelError: they have another shape than those before; DataError from the store. Those before stay.
        """
        hidden = hidden_states_of(output)
        shape = self._shapes[index]
        if hidden.shape != shape:
            raise ModelError(
                f"block {number} returned hidden states {list(hidden.shape)} for {list(shape)}: {OTHER_MODE}."
            )
        self._store.put(self._key(index), hidden)
        if number == len(self._blocks) - 1:
            self._last_form = ReturnForm(output)

    @contextmanager
    def whole_passes(self) -> Iterator[Forward]:
        """Run the model with blocks that only return: the last one what it returned when it ran."""
        on_call = self._weights.on_call(self._model, self._blocks, blocks_run=False)
        with on_call, forwards_replaced(self._blocks, self._return_at_once):
            yield self._run_whole

    def _run_whole(self, index: int) -> object:
        self._index, self._num_reached = index, 0
        return self._forward(index)

    def _return_at_once(self, number: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        call = BlockCall(args, kwargs)
        if number < self._num_reached:
            raise ModelError(f"block {number} is reached twice in a forward pass: {REPEATED}.")
        self._num_reached += 1
        if number < len(self._blocks) - 1:
            return self._form(number, forward, call).filled(call.hidden_states)
        return self._last_form.filled(self._store.get(self._key(self._index), self._weights.device, copy=True))

    def close(self) -> None:
        """Drop everything from the store, also of a pass that failed."""
        super().close()
        for index in range(self._num_batches):
            self._store.drop(self._key(index))

    def _key(self, index: int) -> str:
        """Return the name in the store of a batch's hidden states, at whatever block they are."""
        return f"hidden-{index}-{id(self):x}"


def _where(call: BlockCall, tensor: Tensor) -> str:
    """Return which argument holds a tensor, for an error."""
    named = {**{f"number {position}": value for position, value in enumerate(call.args)}, **call.kwargs}
    return next((name for name, value in named.items() if any(t is tensor for t in nested_leaves(value, Tensor))), "?")

"""Calls of a block, kept: the hidden states of each in a store, equal other arguments of all of them once."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, overload

import torch
from torch import Tensor

from megascore.capture.devices import usable_device
from megascore.capture.nested import nested_leaves, nested_replace
from megascore.capture.stores import HostStore, TensorStore
from megascore.errors import ModelError

__all__ = ["HIDDEN_STATES", "BlockCall", "StoredCalls"]

HIDDEN_STATES = "hidden_states"
"""Keyword under which models pass hidden states, where they do not pass them as the first positional argument."""
READY_BYTES = 1 << 25
"""Memory on the compute device for other arguments than hidden states that stay there from call to call."""
NUM_RECENT = 8
"""Calls with different arguments that are remembered, to share them: those of the kinds of layers in a model."""


@dataclass(frozen=True)
class BlockCall:
    """All arguments of one call of a block."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    @property
    def hidden_states(self) -> Tensor:
        """The hidden states: the keyword, or else the first positional argument.

        Raises:
            ModelError: neither is a tensor.
        """
        hidden = self.kwargs[HIDDEN_STATES] if self._by_keyword else self.args[0] if self.args else None
        if not isinstance(hidden, Tensor):
            given = ", ".join([*(type(value).__name__ for value in self.args), *(f"{name}=" for name in self.kwargs)])
            raise ModelError(
                f"the block was called with ({given}): its hidden states must be a tensor, given as '{HIDDEN_STATES}=' "
                "or as the first positional argument."
            )
        return hidden

    def with_hidden_states(self, hidden: Any) -> BlockCall:
        """Return this call with other hidden states, at the same place."""
        if self._by_keyword:
            return replace(self, kwargs={**self.kwargs, HIDDEN_STATES: hidden})
        return replace(self, args=(hidden, *self.args[1:]))

    @property
    def _by_keyword(self) -> bool:
        return self.kwargs.get(HIDDEN_STATES) is not None


class _Stored:
    """Stands in a stored call for a tensor that is in the store."""

    def __init__(self, key: str) -> None:
        self.key = key


_HOLE = _Stored("")
"""Stands for the hidden states, which are in the store under a name that belongs to the call."""


class StoredCalls(Sequence[BlockCall]):
    """Calls of one block or of several, in the order in which they were added.

    ``calls[i]`` is a call with its tensors on the compute device; the hidden states are a copy where the store holds
    them there, so that a block may work in place. Tensors are detached. What is no tensor is kept as it is.

    Of the other arguments, which many calls share, the first `READY_BYTES` that are asked for stay on the compute
    device, so that a rotary table is not read from a file for each call.
    """

    def __init__(self, store: TensorStore | None = None, device: torch.device | str = "cpu") -> None:
        """Start empty.

        Args:
            store: Where tensors wait; the host's memory if not given. Several collections may share one.
            device: The compute device, on which calls are given back.

        Raises:
            ConfigError: there is no such device.
        """
        self._store = store if store is not None else HostStore()
        self._device = usable_device(device)
        self._calls: list[BlockCall] = []
        self._hidden_keys: list[str] = []
        self._known: dict[int, tuple[Tensor, _Stored]] = {}
        self._argument_keys: set[str] = set()
        self._ready: dict[str, Tensor] = {}
        self._recent: deque[BlockCall] = deque(maxlen=NUM_RECENT)

    def append(self, call: BlockCall, *, hidden_key: str | None = None) -> None:
        """Keep a call.

        Args:
            call: The whole of it.
            hidden_key: Name in the store of hidden states that are, or will be, there already; those of ``call`` are
                not stored then. Without it they are stored under a name of their own.
        """
        hidden = call.hidden_states
        # Hidden states from elsewhere are others than those that another argument may share.
        shared = hidden if hidden_key is None else None
        others = nested_replace(
            call.with_hidden_states(_HOLE), Tensor, lambda tensor: _HOLE if tensor is shared else self._keep(tensor)
        )
        if hidden_key is None:
            hidden_key = f"hidden-{len(self._calls)}-{id(self):x}"
            self._store.put(hidden_key, hidden)
        self._calls.append(self._shared(others))
        self._hidden_keys.append(hidden_key)

    def forget_identities(self) -> None:
        """End a forward pass: a tensor met later is not one of those met before, even at the same address."""
        self._known.clear()

    def hidden_key(self, index: int) -> str:
        """Return the name under which the hidden states of a call are in the store."""
        return self._hidden_keys[index]

    @overload
    def __getitem__(self, index: int) -> BlockCall: ...
    @overload
    def __getitem__(self, index: slice) -> list[BlockCall]: ...
    def __getitem__(self, index: int | slice) -> BlockCall | list[BlockCall]:
        """Return a call, or a list of them, on the compute device."""
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        hidden = self._store.get(self._hidden_keys[index], self._device, copy=True)
        fetched = nested_replace(self._calls[index], _Stored, lambda stored: self._fetch(stored, hidden))
        return BlockCall(fetched.args, fetched.kwargs)

    def __len__(self) -> int:
        """Return the number of calls."""
        return len(self._calls)

    def __iter__(self) -> Iterator[BlockCall]:
        """Iterate over the calls, each being fetched when it is its turn."""
        return (self[number] for number in range(len(self)))

    def truncate(self, length: int) -> None:
        """Forget the calls from number ``length`` on, and drop from the store what belonged to them alone."""
        dropped = set(self._hidden_keys[length:])
        del self._calls[length:], self._hidden_keys[length:]
        used = {stored.key for stored in nested_leaves(self._calls, _Stored)}
        for key in dropped - set(self._hidden_keys) | self._argument_keys - used:
            self._store.drop(key)
        self._argument_keys &= used
        self._ready = {key: tensor for key, tensor in self._ready.items() if key in used}
        self._known.clear()

    def _shared(self, call: BlockCall) -> BlockCall:
        """Return a call from before that is the same but for its hidden states, so that thousands take no memory."""
        for known in self._recent:
            if _same(known.args, call.args) and _same(known.kwargs, call.kwargs):
                return known
        self._recent.append(call)
        return call

    def _fetch(self, stored: _Stored, hidden: Tensor) -> Tensor:
        if stored is _HOLE:
            return hidden
        if stored.key in self._ready:
            return self._ready[stored.key]
        # Whoever asks first may be in inference mode, and the next one not.
        with torch.inference_mode(False):
            tensor = self._store.get(stored.key, self._device)
        if tensor.nbytes + sum(ready.nbytes for ready in self._ready.values()) <= READY_BYTES:
            self._ready[stored.key] = tensor
        return tensor

    def _keep(self, tensor: Tensor) -> _Stored:
        """Store one of the other arguments under a name that says what is in it."""
        if id(tensor) not in self._known:
            key = f"argument-{_digest(tensor)}-{id(self):x}"
            if key not in self._store:
                self._store.put(key, tensor)
                self._argument_keys.add(key)
            # With the tensor itself, whose address could be another's otherwise.
            self._known[id(tensor)] = tensor, _Stored(key)
        return self._known[id(tensor)][1]


def _same(one: Any, other: Any) -> bool:
    """Tell whether two stored arguments are equal, as far as that can be told of things of this kind."""
    if type(one) is not type(other):
        return False
    if isinstance(one, _Stored):
        return bool(one.key == other.key)
    if type(one) in (tuple, list):
        return len(one) == len(other) and all(map(_same, one, other))
    if type(one) is dict:
        return one.keys() == other.keys() and all(_same(value, other[key]) for key, value in one.items())
    return one is other or (type(one) in (bool, int, float, str) and bool(one == other))


def _digest(tensor: Tensor) -> str:
    """Return a short text that only equal tensors share."""
    content = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)
    digest = hashlib.blake2b(f"{tensor.dtype} {list(tensor.shape)}".encode(), digest_size=16)
    digest.update(content.numpy().data)
    return digest.hexdigest()

"""Capture of a block's arguments: a pre-hook keeps its arguments, and the forward pass ends there."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from types import TracebackType
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from megascore.capture.caches import refuse_caches, without_caches
from megascore.capture.calls import BlockCall, StoredCalls
from megascore.capture.nested import nested_move_to
from megascore.capture.stores import TensorStore
from megascore.capture.surroundings import without_compiling
from megascore.errors import ConfigError, ModelError

__all__ = ["BlockInputCapture", "Halt", "capture_block_inputs", "run_model"]


class Halt(BaseException):
    """Ends a forward pass from inside, on its way to the one who raised it.

    No ``Exception``, as it is no error: a model that catches those does not catch it.
    """

    def __init__(self, owner: object) -> None:
        """Say who waits for it; others let it pass."""
        super().__init__("a forward pass was halted by megascore.capture, and nobody caught it")
        self._owner = owner

    def catch(self, owner: object) -> None:
        """Return if it belongs to ``owner``, and let it go on if not."""
        if self._owner is not owner:
            raise self


class BlockInputCapture:
    """Keeps all arguments of a block, forward pass after forward pass, and halts each pass there.

    >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
    >>> batches = [torch.ones(1, 2), torch.zeros(4, 2)]
    >>> with BlockInputCapture(model[1]) as capture:
    ...     for batch in batches:
    ...         capture.run(model, batch)
    >>> [list(model[1](*call.args, **call.kwargs).shape) for call in capture.inputs]
    [[1, 3], [4, 3]]

    - Only this capture's own halt ends in `run`. Errors of the model, and halts of other captures (of an outer model,
      say), come through; the pass that they end leaves nothing in `inputs`.
    - A halted pass ends at the first call of the block, and does not see whether there would be another in this pass;
      with ``halt=False`` a second one is an error.
    - Captured tensors are detached, and normal tensors also where the pass ran in inference mode. The modes of the
      caller (`torch.no_grad`, inference mode, autocast) hold in the pass, and are as before after it.
    - A block that is given a cache of keys and values (`transformers.DynamicCache`) is refused, as the cache would hold
      those of all layers before, outside of the store, and grow whenever the block runs on what was kept. The model's
      own settings are left alone here: a model of transformers makes a cache unless it is called with
      ``use_cache=False``, or has that in its config. `capture_block_inputs` sees to it by itself.
    - A compiled model runs uncompiled here, as a hook that is put on it later would go unheard.
    - Halting or not, the hook is gone when the ``with`` block is left, however that happens.
    """

    def __init__(
        self,
        block: nn.Module,
        *,
        halt: bool = True,
        store: TensorStore | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        """Prepare; the hook is put on when the ``with`` block is entered.

        Args:
            block: The module whose arguments are kept.
            halt: End the pass at the block. Otherwise it goes on: where other ranks would wait for it.
            store: Where tensors wait; the host's memory if not given.
            device: Where `inputs` gives tensors; the block's own device if not given.

        Raises:
            ConfigError: there is no such device.
        """
        self._block = block
        self._halts = halt
        self.inputs = StoredCalls(store, device if device is not None else device_of(block))
        """The calls so far, one for each pass, as a sequence of `BlockCall`."""
        self._handle: RemovableHandle | None = None
        self._num_reached = 0

    def __enter__(self) -> BlockInputCapture:
        """Put the hook on.

        Raises:
            ModelError: it is on.
        """
        if self._handle is not None:
            raise ModelError("this BlockInputCapture has its hook on already: leave its 'with' block before the next.")
        # First of all hooks of the block: others may do work that is not needed when the pass ends here.
        self._handle = self._block.register_forward_pre_hook(self._observe, prepend=True, with_kwargs=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Take the hook off."""
        assert self._handle is not None
        self._handle.remove()
        self._handle = None

    def run(self, forward: Callable[..., object], *args: Any, **kwargs: Any) -> None:
        """Run one forward pass, ``forward(*args, **kwargs)``, until it reaches the block.

        Raises:
            ModelError: the block was not reached, or more than once in a pass that was not halted, or it was given a
                cache, or the model caught the halt with a bare ``except``. Nothing of this pass is kept.
        """
        if self._handle is None:
            raise ModelError("BlockInputCapture.run needs its hook: call it inside of 'with capture:'.")
        num_before = len(self.inputs)
        self._num_reached, kept = 0, False
        try:
            with without_compiling():
                forward(*args, **kwargs)
            kept = not self._halts and self._num_reached == 1
        except Halt as halt:
            halt.catch(self)
            kept = True
        finally:
            self.inputs.forget_identities()
            if not kept:
                self.inputs.truncate(num_before)
        if not kept:
            self._raise_not_captured()

    def _raise_not_captured(self) -> NoReturn:
        name = type(self._block).__name__
        if self._num_reached == 0:
            raise ModelError(
                f"the forward pass ended without reaching the block ({name}): is it part of the model that ran, and "
                "does the model use it for this batch?"
            )
        if self._halts:
            raise ModelError(
                f"the forward pass went on after it was halted at the block ({name}): the model catches "
                "BaseException. Let that through, or capture with halt=False."
            )
        raise ModelError(
            f"the block ({name}) was reached {self._num_reached} times in one forward pass: its inputs are not one "
            "call. Blocks that a model shares between layers, or runs again, cannot be captured."
        )

    def _observe(self, _block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._num_reached += 1
        if self._num_reached == 1:
            call = BlockCall(args, kwargs)
            refuse_caches(call)
            self.inputs.append(call)
        if self._halts:
            raise Halt(self)


def capture_block_inputs(
    model: nn.Module,
    block: nn.Module | str,
    batches: Iterable[Any],
    *,
    store: TensorStore | None = None,
    device: torch.device | str | None = None,
) -> StoredCalls:
    """Run a model up to one of its blocks, and return what the block is given for each batch.

    Without gradients, and without the cache of keys and values that a model of transformers makes; the mode of the
    model (training or not) is left as it is.

    Args:
        model: Called as ``model(**batch)`` for a mapping, ``model(*batch)`` for a tuple or list, else ``model(batch)``.
        block: A module of the model, or its dotted name.
        batches: For each pass what the model is called with. Tensors in it are moved to the device of the model's first
            parameter.
        store: Where tensors wait; the host's memory if not given.
        device: Where the calls are given back; the block's own device if not given.

    Returns:
        One call for each batch.

    Raises:
        ConfigError: ``batches`` is one tensor, or there is no such device.
        ModelError: there is no such block, or a pass did not reach it, or the batches hold a cache.
    """
    refuse_single_tensor(batches)
    capture = BlockInputCapture(_find_block(model, block), store=store, device=device)
    with torch.no_grad(), without_caches(model), capture:
        for batch in batches:
            capture.run(run_model, model, nested_move_to(batch, device_of(model)))
    return capture.inputs


def run_model(model: nn.Module, batch: Any) -> Any:
    """Return ``model(**batch)`` for a mapping, ``model(*batch)`` for a tuple or list, else ``model(batch)``."""
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, (tuple, list)):
        return model(*batch)
    return model(batch)


def refuse_single_tensor(batches: object) -> None:
    """Refuse a tensor in place of batches, whose rows would be taken for batches without a batch dimension.

    Raises:
        ConfigError: it is one.
    """
    if isinstance(batches, Tensor):
        raise ConfigError(
            f"batches is a tensor {list(batches.shape)}, expected one entry for each batch: give [tokens] for a single "
            "batch of all samples, or tokens.split(8) for batches of 8."
        )


def device_of(module: nn.Module) -> torch.device:
    """Return the device of the first parameter or buffer that has one; the CPU if there is none."""
    tensors = (*module.parameters(), *module.buffers())
    return next((tensor.device for tensor in tensors if not tensor.is_meta), torch.device("cpu"))


def _find_block(model: nn.Module, block: nn.Module | str) -> nn.Module:
    if isinstance(block, nn.Module):
        if not any(module is block for module in model.modules()):
            raise ModelError(f"the block ({type(block).__name__}) is not part of the model ({type(model).__name__}).")
        return block
    try:
        return model.get_submodule(block)
    except AttributeError as error:
        names = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
        raise ModelError(
            f"{type(model).__name__} has no block '{block}' ({error}); its lists of modules: "
            f"{', '.join(names) or 'none'}."
        ) from error

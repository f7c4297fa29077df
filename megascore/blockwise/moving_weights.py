"""Weights that are on the compute device only while their module runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from megascore.blockwise.offload_hooks import REMOVE_HOOKS, has_offload_hook
from megascore.capture.devices import usable_device
from megascore.errors import ModelError
from megascore.weights.huggingface.folder import WeightsFolder
from megascore.weights.huggingface.names import stored_name

__all__ = ["MovingWeights"]

_Table = dict[str, "Tensor | None"]


class MovingWeights:
    """Brings the parameters and buffers of a module to the compute device, and puts the old ones back.

    Those in memory come from where they are; those on torch's meta device, which have no content, are read from a
    checkpoint folder, in the dtype of the model. The modules hold their own tensors again afterwards, so that nothing
    is copied back, and tensors that are tied are brought once. Where everything is in its place, nothing happens.
    """

    def __init__(self, model: nn.Module, device: torch.device | str, folder: str | Path | None = None) -> None:
        """Look into the folder; nothing is read yet.

        Args:
            model: All of it, as names in the checkpoint count from here.
            device: The compute device.
            folder: Checkpoint folder with the weights on the meta device, if there are some.

        Raises:
            ConfigError: there is no such device.
            ModelError: weights or buffers without content that the folder does not have, or not in this shape.
        """
        self.device = usable_device(device)
        self._folder = None if folder is None else WeightsFolder(folder)
        self._sources = self._find_sources(model)
        self._is_offloaded = has_offload_hook(model)
        self._here: dict[int, Tensor] = {}

    def check(self, modules: Iterable[nn.Module]) -> None:
        """Refuse modules whose weights are nowhere, before anything runs.

        Raises:
            ModelError: naming weights or buffers without content that the folder does not have.
        """
        self._check(tensor for module in modules for _, tensor in _named_tensors(module))

    @contextmanager
    def present(self, *modules: nn.Module) -> Iterator[None]:
        """Have all weights of modules, and of those inside them, on the compute device."""
        owners = {id(owner): owner for module in modules for owner in module.modules()}
        with self._brought(list(owners.values())):
            yield

    @contextmanager
    def on_call(self, model: nn.Module, blocks: Sequence[nn.Module], *, blocks_run: bool) -> Iterator[None]:
        """Bring weights when their module is called.

        Those outside of blocks stay until the end of the context, as some are used at both ends of a model. Those of a
        block come all at once and leave when it returns.

        Args:
            model: The model.
            blocks: Its blocks.
            blocks_run: Whether blocks really run; otherwise nothing is brought for them.
        """
        in_blocks = {id(module) for block in blocks for module in block.modules()}
        with ExitStack() as handles, ExitStack() as held:
            for module in model.modules():
                if id(module) not in in_blocks and self._away([module]):
                    handles.enter_context(_before(module, lambda module: self._bring_into(held, [module])))
            for block in blocks if blocks_run else ():
                handles.enter_context(self._during(block))
            yield

    @contextmanager
    def _during(self, block: nn.Module) -> Iterator[None]:
        held = ExitStack()
        # Closed by the context too: a pass that ends inside of the block never gets to its end.
        with held, _before(block, lambda block: self._bring_into(held, list(block.modules()))):
            handle = block.register_forward_hook(lambda *_: held.close(), always_call=True)
            try:
                yield
            finally:
                handle.remove()

    def _bring_into(self, held: ExitStack, owners: Sequence[nn.Module]) -> None:
        if self._away(owners):
            held.enter_context(self._brought(owners))

    @contextmanager
    def _brought(self, owners: Sequence[nn.Module]) -> Iterator[None]:
        away = self._away(owners)
        missing = {id(tensor): tensor for _, _, tensor in away if id(tensor) not in self._here}
        fresh = self._fetch(list(missing.values()))
        self._here.update(fresh)
        try:
            for table, name, tensor in away:
                table[name] = self._here[id(tensor)]
            yield
        finally:
            for table, name, tensor in away:
                table[name] = tensor
            for key in fresh:
                del self._here[key]

    def _away(self, owners: Sequence[nn.Module]) -> list[tuple[_Table, str, Tensor]]:
        """Return where the tensors stand that are not on the compute device."""
        return [
            (table, name, tensor)
            for owner in owners
            for table in _tables(owner)
            for name, tensor in table.items()
            if tensor is not None and tensor.device != self.device
        ]

    def _fetch(self, tensors: Sequence[Tensor]) -> dict[int, Tensor]:
        self._check(tensors)
        content = {id(tensor): tensor for tensor in tensors}
        if self._folder is not None:
            with self._folder.reading() as read:
                content.update({id(tensor): read(self._sources[id(tensor)]) for tensor in tensors if tensor.is_meta})
        return {id(tensor): self._like(tensor, content[id(tensor)]) for tensor in tensors}

    def _check(self, tensors: Iterable[Tensor]) -> None:
        missing = [self._names[id(t)] for t in tensors if t.is_meta and id(t) not in self._sources]
        if missing:
            listed = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
            where = "without weights= there is" if self._folder is None else f"{self._folder.folder} has"
            hint = f" Hooks of accelerate take weights away: bring them back with {REMOVE_HOOKS}, or give weights=."
            raise ModelError(
                f"{where} no content for {len(missing)} tensors of the model that are on the meta device: "
                f"{listed}. Parameters must be in the folder under these names; buffers that are in no checkpoint, "
                "such as rotary tables, must be real, as score_blockwise makes them where the folder is the model."
                + (hint if self._is_offloaded else "")
            )

    def _like(self, tensor: Tensor, content: Tensor) -> Tensor:
        moved = content.detach().to(self.device, tensor.dtype)
        if isinstance(tensor, nn.Parameter):
            moved = nn.Parameter(moved, requires_grad=tensor.requires_grad)
        # What others note on tensors: Megatron, which parameters are split over ranks.
        moved.__dict__.update(tensor.__dict__)
        return moved

    def _find_sources(self, model: nn.Module) -> dict[int, str]:
        """Return the name in the checkpoint of each tensor without content that is there."""
        names: dict[int, list[str]] = {}
        for name, tensor in _named_tensors(model):
            if tensor.is_meta:
                names.setdefault(id(tensor), []).append(name)
        self._names = {key: own[0] for key, own in names.items()}
        if self._folder is None:
            return {}
        stored, prefix = self._folder.tensors, str(getattr(model, "base_model_prefix", ""))
        found = {key: stored_name(own, prefix, stored) for key, own in names.items()}
        sources = {key: name for key, name in found.items() if name is not None}
        for own_name, tensor in _named_tensors(model):
            source = sources.get(id(tensor))
            if source is not None and stored[source].shape != tuple(tensor.shape):
                raise ModelError(
                    f"{source} in {self._folder.folder} has shape {list(stored[source].shape)}, the model expects "
                    f"{list(tensor.shape)} for {own_name}: the folder is of another model."
                )
        return sources


def _named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _tables(owner: nn.Module) -> tuple[Any, Any]:
    # Set there and not as attributes, which a module may have made a property, or watch.
    return owner._parameters, owner._buffers


@contextmanager
def _before(module: nn.Module, function: Callable[[nn.Module], object]) -> Iterator[None]:
    def call(module: nn.Module, _args: object) -> None:
        function(module)

    handle = module.register_forward_pre_hook(call)
    try:
        yield
    finally:
        handle.remove()

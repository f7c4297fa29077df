"""Hooks of accelerate that move weights by themselves are silent while blocks are scored alone. Tier: pure.

accelerate is not installed with the tests. The hooks here have the attributes and do the work of those of 1.15:
`AlignDevicesHook`, which `add_hook_to_module` puts on a module, `SequentialHook` and `CpuOffload`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import megascore
from megascore.blockwise.offload_hooks import moving_hooks_silent
from megascore.errors import ModelError
from tests.blockwise.test_score_blocks import BOTH_MODES, assert_same
from tests.blockwise.tiny_decoder import TinyDecoder, make_batches

REMOVE = r"accelerate\.hooks\.remove_hook_from_submodules\(model\)"


class Hook:
    """Watches, as accelerate's `ModelHook`."""

    def pre_forward(self, module: nn.Module) -> None:
        """Nothing."""

    def post_forward(self, module: nn.Module) -> None:
        """Nothing."""


class AlignDevicesHook(Hook):
    def __init__(self, module: nn.Module, execution_device: Any = None, *, offload: bool = False) -> None:
        self.execution_device, self.offload = execution_device, offload
        self.weights_map = {name: parameter.detach() for name, parameter in module.named_parameters(recurse=False)}
        self.post_forward(module)

    def pre_forward(self, module: nn.Module) -> None:
        for name, value in self.weights_map.items() if self.offload else ():
            module._parameters[name] = nn.Parameter(value)

    def post_forward(self, module: nn.Module) -> None:
        for name, value in self.weights_map.items() if self.offload else ():
            module._parameters[name] = nn.Parameter(value.to("meta"))


class SequentialHook(Hook):
    def __init__(self, *hooks: Hook) -> None:
        self.hooks = hooks

    def pre_forward(self, module: nn.Module) -> None:
        for hook in self.hooks:
            hook.pre_forward(module)

    def post_forward(self, module: nn.Module) -> None:
        for hook in self.hooks:
            hook.post_forward(module)


class CpuOffload(Hook):
    def __init__(self) -> None:
        self.prev_module_hook, self.execution_device = None, torch.device("cpu")


def new_forward(module: Any, *args: Any, **kwargs: Any) -> Any:
    module._hf_hook.pre_forward(module)
    output = module._old_forward(*args, **kwargs)
    module._hf_hook.post_forward(module)
    return output


def add(model: nn.Module, make_hook: Callable[[nn.Module], Hook]) -> nn.Module:
    for module in model.modules():
        if module._parameters:
            wanted: Any = module
            wanted._hf_hook, wanted._old_forward = make_hook(module), module.forward
            wanted.forward = partial(new_forward, module)
    return model


def remove(model: nn.Module) -> nn.Module:
    for module in model.modules():
        wanted: Any = module
        if hasattr(module, "_hf_hook"):
            wanted._hf_hook.pre_forward(module)
            wanted.forward = wanted._old_forward
            del wanted._hf_hook, wanted._old_forward
    return model


def offloading(module: nn.Module) -> Hook:
    return AlignDevicesHook(module, "cpu", offload=True)


MOVING: dict[str, Callable[[nn.Module], Hook]] = {
    "offload": offloading,
    "offload among others": lambda module: SequentialHook(Hook(), SequentialHook(offloading(module))),
    "whole modules": lambda _: CpuOffload(),
    "to another device": lambda module: AlignDevicesHook(module, "meta"),
    "to the first GPU": lambda module: AlignDevicesHook(module, 0),
}
HARMLESS: dict[str, Callable[[nn.Module], Hook]] = {
    "watches": lambda _: Hook(),
    "on no device": AlignDevicesHook,
    "on this device": lambda module: AlignDevicesHook(module, torch.device("cpu")),
    "several": lambda module: SequentialHook(Hook(), AlignDevicesHook(module, "cpu")),
}


@BOTH_MODES
@pytest.mark.parametrize("hook", MOVING)
def test_hooks_that_move_weights_are_silent_and_the_scores_are_the_same(
    hook: str, cache_block_outputs: bool, tmp_path: Path
) -> None:
    model, batches = TinyDecoder(), make_batches()
    assert len(batches) > 1
    expected = megascore.score_blockwise(model, None, batches, cache_block_outputs=cache_block_outputs)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    add(model, MOVING[hook])
    forwards = [module.forward for module in model.modules()]
    if any(parameter.is_meta for parameter in model.parameters()):
        with pytest.raises(ModelError, match=rf"without weights= there is no content .*accelerate .*{REMOVE}, or give"):
            megascore.score_blockwise(model, None, batches, cache_block_outputs=cache_block_outputs)
    options: dict[str, Any] = {"cache_block_outputs": cache_block_outputs, "weights": tmp_path, "device": "cpu"}
    assert_same(megascore.score_blockwise(model, None, batches, **options), expected)
    assert [module.forward for module in model.modules()] == forwards
    assert_same(megascore.score_blockwise(remove(model), None, batches), expected)


def test_hooks_are_as_before_after_an_error() -> None:
    model = add(TinyDecoder(), MOVING["whole modules"])
    forwards = [module.forward for module in model.modules()]
    with pytest.raises(ZeroDivisionError), moving_hooks_silent(model, torch.device("cpu")):
        assert [module.forward for module in model.modules()] != forwards
        raise ZeroDivisionError
    assert [module.forward for module in model.modules()] == forwards


@pytest.mark.parametrize("hook", HARMLESS)
def test_hooks_that_move_nothing_stay(hook: str) -> None:
    model, batches = TinyDecoder(), make_batches()
    expected = megascore.score_blockwise(model, None, batches)
    assert_same(megascore.score_blockwise(add(model, HARMLESS[hook]), None, batches), expected)
    assert any(hasattr(module, "_hf_hook") for module in model.modules())


def test_attach_tells_what_takes_the_weights_away() -> None:
    model = add(TinyDecoder(), offloading)
    with pytest.raises(ModelError, match=rf"only while it runs: accelerate .*Call {REMOVE}, and attach\(\)"):
        megascore.attach(model, recipe="minitron")
    with megascore.attach(remove(model)):
        pass
    with pytest.raises(ModelError, match=r"load the whole model before attach\(\)"):
        megascore.attach(TinyDecoder().to("meta"))

"""Weights that come when a module runs and go afterwards. The meta device stands in for a compute device of its own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from megascore.blockwise.moving_weights import MovingWeights
from megascore.errors import ConfigError

pytestmark = pytest.mark.fast


class Tied(nn.Module):
    """An embedding, two blocks and a head with the embedding's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 4)
        self.scale = nn.Parameter(torch.ones(4))
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)) for _ in range(2))
        self.head = nn.Linear(4, 10, bias=False)
        self.head.weight = self.embedding.weight
        self.unused = nn.Linear(1, 1)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens) * self.scale
        for block in self.blocks:
            x = block(x)
        return self.head(x)


@pytest.fixture
def model() -> Tied:
    return Tied().eval()


def away(module: nn.Module) -> set[str]:
    named = (*module.named_parameters(remove_duplicate=False), *module.named_buffers())
    return {name for name, tensor in named if tensor.is_meta}


def test_a_module_has_its_weights_there_and_its_own_ones_back(model: Tied) -> None:
    own = {name: id(tensor) for name, tensor in model.state_dict(keep_vars=True).items()}
    weights = MovingWeights(model, "meta")
    with pytest.raises(ZeroDivisionError), weights.present(model.blocks[1]):
        assert away(model) == {name for name in own if name.startswith("blocks.1.")}
        assert isinstance(model.blocks[1][0].weight, nn.Parameter)
        with weights.present(model.blocks[1][0]):
            pass
        assert model.blocks[1][0].weight.is_meta
        raise ZeroDivisionError
    assert {name: id(tensor) for name, tensor in model.state_dict(keep_vars=True).items()} == own


def test_tied_weights_come_once(model: Tied) -> None:
    weights = MovingWeights(model, "meta")
    with weights.present(model.embedding), weights.present(model.head):
        assert model.embedding.weight is model.head.weight
    with weights.present(model.embedding, model.head):
        assert model.embedding.weight is model.head.weight
    assert model.embedding.weight is model.head.weight


def test_a_pass_brings_what_it_calls_and_one_block_at_a_time(model: Tied) -> None:
    weights, seen = MovingWeights(model, "meta"), []
    for block in model.blocks:
        block[1].register_forward_hook(lambda *_: seen.append({n.split(".")[1] for n in away(model) if "blocks" in n}))
    with weights.on_call(model, model.blocks, blocks_run=True):
        for _ in range(2):
            assert model(torch.zeros(3, dtype=torch.int64, device="meta")).is_meta
        assert away(model) == {"embedding.weight", "scale", "head.weight"}
    assert seen == [{"0"}, {"1"}] * 2
    assert not away(model)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_pass_that_fails_inside_of_a_block_leaves_nothing_there(model: Tied) -> None:
    weights = MovingWeights(model, "meta")
    handle = model.blocks[1][1].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError), weights.on_call(model, model.blocks, blocks_run=True):
        model(torch.zeros(3, dtype=torch.int64, device="meta"))
    handle.remove()
    assert not away(model)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_nothing_is_put_on_a_model_that_is_where_it_runs(model: Tied) -> None:
    with MovingWeights(model, "cpu").on_call(model, model.blocks, blocks_run=False):
        assert not any(module._forward_pre_hooks for module in model.modules())


def test_what_others_note_on_weights_comes_along(model: Tied) -> None:
    linear, norm = model.blocks[0]
    linear.weight.tensor_model_parallel = True
    norm.running_mean.sequence_parallel = True
    linear.bias.requires_grad_(False)
    with MovingWeights(model, "meta").present(model.blocks[0]):
        assert linear.weight.is_meta
        assert linear.weight.tensor_model_parallel is True
        assert norm.running_mean.sequence_parallel is True
        assert linear.weight.requires_grad
        assert not linear.bias.requires_grad


NOT_HERE = ["cuad", "cuda:x", "xpu"]
"""The last as CUDA is where PyTorch is built without; CUDA itself must stay untouched in tests without a GPU."""


@pytest.mark.parametrize("device", NOT_HERE)
def test_a_device_that_is_not_there_is_told(model: Tied, device: str) -> None:
    with pytest.raises(ConfigError, match=f"device='{device}' cannot be used on this machine: .*visible here"):
        MovingWeights(model, device)

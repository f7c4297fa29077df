"""The Megatron hooks by themselves, on single modules: each gives what its parent gives on the unsharded module."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megascore.config import ParallelConfig
from megascore.errors import HookStateError, ModelError
from megascore.hooks import (
    ForwardHook,
    IndependentChannelContributionHook,
    IndependentKvHeadContributionHook,
    IterativeChannelContributionHook,
    L2NormHook,
    LayerNormContributionHook,
)
from tests.pool import WorkerPool

CPU = torch.device("cpu")
SEQUENCE_LENGTH, BATCH_SIZE, NUM_CALLS = 8, 3, 4
NUM_INPUTS, NUM_OUTPUTS, HEAD_DIM, NUM_HEADS = 24, 10, 3, 8
ITERATIVE = {"validation_full_iters": NUM_CALLS, "calibration_method": "scale_by_magnitude"}


def make_data() -> tuple[Tensor, Tensor, list[Tensor]]:
    """Weight [E, C], bias [E] and inputs [S, B, C] of each call, float64."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(NUM_OUTPUTS, NUM_INPUTS, dtype=torch.float64, generator=generator)
    bias = torch.randn(NUM_OUTPUTS, dtype=torch.float64, generator=generator)
    shape = (SEQUENCE_LENGTH, BATCH_SIZE, NUM_INPUTS)
    calls = [torch.randn(shape, dtype=torch.float64, generator=generator) for _ in range(NUM_CALLS)]
    return weight, bias, calls


def expected_results(num_kv_heads: int) -> dict[str, Tensor]:
    """Results of the parents on an ordinary linear layer."""
    weight, bias, calls = make_data()
    linear = nn.Linear(NUM_INPUTS, NUM_OUTPUTS, dtype=torch.float64)
    linear.load_state_dict({"weight": weight, "bias": bias})
    hooks: dict[str, ForwardHook] = {
        "MegatronL2NormHook": L2NormHook(),
        "MegatronIndependentChannelContributionHook": IndependentChannelContributionHook(linear),
        "MegatronIterativeChannelContributionHook": IterativeChannelContributionHook(linear, ITERATIVE),
        "MegatronIndependentKvHeadContributionHook": IndependentKvHeadContributionHook.for_heads(linear, num_kv_heads),
    }
    for x in calls:
        for hook in hooks.values():
            hook(linear, (x,), linear(x))
    return {name: hook.accumulate() for name, hook in hooks.items()}


CASES: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "TP=2": (2, {"tensor": 2}, {}),
    "TP=2 with sequence parallel": (2, {"tensor": 2, "sequence": True}, {}),
    "TP=2 with a bias inside the output": (2, {"tensor": 2}, {"skip_bias_add": False}),
    "TP=2 given the whole input": (2, {"tensor": 2}, {"input_is_parallel": False}),
    "TP=4 with two KV heads": (4, {"tensor": 4}, {"num_kv_heads": 2}),
    "TP=2 with one KV head": (2, {"tensor": 2}, {"num_kv_heads": 1}),
}


@pytest.mark.parametrize("case", CASES)
def test_linear_hooks_give_global_scores(case: str, world: WorkerPool) -> None:
    world_size, degrees, options = CASES[case]
    expected = expected_results(options.get("num_kv_heads", 4))
    for results in world.run(world_size, run_linear_hooks, ParallelConfig(**degrees), options):
        assert results.keys() == expected.keys()
        for name, result in results.items():
            # float64: only the order of additions differs.
            torch.testing.assert_close(result, expected[name], rtol=1e-12, atol=0, msg=f"{name} on {case}")


def run_linear_hooks(parallel: ParallelConfig, options: dict[str, Any]) -> dict[str, Tensor]:
    import megascore.mcore
    from megascore.mcore.world.parallel_world import parallel_world

    with parallel_world(parallel, CPU, timedelta(seconds=60)):
        linear, rank = _row_parallel_linear(parallel, **options)
        hooks = _hooks(megascore.mcore, linear)
        for hook in hooks.values():
            linear.register_forward_hook(hook)
        width = NUM_INPUTS // parallel.tensor
        for x in make_data()[2]:
            linear(x if not linear.input_is_parallel else x[..., rank * width : (rank + 1) * width].contiguous())
        results = {name: hook.accumulate() for name, hook in hooks.items()}
        _check_states_travel(megascore.mcore, linear, hooks)
        return results


def _hooks(mcore: Any, linear: nn.Module) -> dict[str, Any]:
    return {
        "MegatronL2NormHook": mcore.MegatronL2NormHook(),
        "MegatronIndependentChannelContributionHook": mcore.MegatronIndependentChannelContributionHook(linear),
        "MegatronIterativeChannelContributionHook": mcore.MegatronIterativeChannelContributionHook(linear, ITERATIVE),
        "MegatronIndependentKvHeadContributionHook": mcore.MegatronIndependentKvHeadContributionHook(linear),
    }


def _check_states_travel(mcore: Any, linear: nn.Module, hooks: dict[str, Any]) -> None:
    """What all ranks save is the parent's state, and loaded into fresh hooks gives the same scores."""
    fresh = _hooks(mcore, linear)
    fresh["MegatronL2NormHook"].put_on(linear)
    plain = L2NormHook()
    plain.load_state_dict(hooks["MegatronL2NormHook"].state_dict())
    torch.testing.assert_close(plain.accumulate(), hooks["MegatronL2NormHook"].accumulate(), rtol=0, atol=0)
    for name, hook in hooks.items():
        fresh[name].load_state_dict(hook.state_dict())
        torch.testing.assert_close(fresh[name].accumulate(), hook.accumulate(), rtol=1e-15, atol=0, msg=name)


def _row_parallel_linear(
    parallel: ParallelConfig, skip_bias_add: bool = True, input_is_parallel: bool = True, num_kv_heads: int = 4
) -> tuple[Any, int]:
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import RowParallelLinear
    from megatron.core.transformer.transformer_config import TransformerConfig

    config = TransformerConfig(
        num_layers=1,
        hidden_size=HEAD_DIM * NUM_HEADS,
        num_attention_heads=NUM_HEADS,
        num_query_groups=num_kv_heads,
        sequence_parallel=parallel.sequence,
        tensor_model_parallel_size=parallel.tensor,
        params_dtype=torch.float64,
        use_cpu_initialization=True,
    )
    linear = RowParallelLinear(
        NUM_INPUTS,
        NUM_OUTPUTS,
        config=config,
        init_method=nn.init.zeros_,
        bias=True,
        input_is_parallel=input_is_parallel,
        skip_bias_add=skip_bias_add,
    )
    weight, bias, _ = make_data()
    rank = parallel_state.get_tensor_model_parallel_rank()
    width = NUM_INPUTS // parallel.tensor
    with torch.no_grad():
        linear.weight.copy_(weight[:, rank * width : (rank + 1) * width])
        linear.bias.copy_(bias)
    return linear, rank


def kv_settings(num_kv_heads: int | None, model: Any = None) -> dict[str, Any]:
    block = SimpleNamespace(attention=SimpleNamespace(num_key_value_heads=num_kv_heads))
    return {"block_config": block, "model": model, "optimize_for": "memory"}


@pytest.mark.parametrize("num_kv_heads", [4, 1])
def test_the_kv_head_hook_takes_what_its_parent_takes(num_kv_heads: int, world: WorkerPool) -> None:
    """Of a layer that knows no heads, and of one in whose model other layers have other numbers of them."""
    expected = expected_results(num_kv_heads)["MegatronIndependentKvHeadContributionHook"]
    for results in world.run(2, run_kv_head_hooks, num_kv_heads):
        assert len(results) == 4
        for result in results:
            torch.testing.assert_close(result, expected, rtol=1e-12, atol=0)


def run_kv_head_hooks(num_kv_heads: int) -> list[Tensor]:
    from megatron.core.model_parallel_config import ModelParallelConfig

    from megascore.mcore import MegatronIndependentKvHeadContributionHook as Hook
    from megascore.mcore.world.parallel_world import parallel_world

    parallel = ParallelConfig(tensor=2)
    with parallel_world(parallel, CPU, timedelta(seconds=60)):
        # Its config says 2.
        linear, rank = _row_parallel_linear(parallel, num_kv_heads=2)
        config = SimpleNamespace(num_attention_heads=NUM_HEADS, hidden_size=NUM_INPUTS)
        of_block = kv_settings(num_kv_heads, SimpleNamespace(config=config))
        hooks = [Hook(linear, of_block), Hook(linear, kv_settings(num_kv_heads)), Hook.for_heads(linear, num_kv_heads)]
        linear.config = ModelParallelConfig()
        hooks.append(Hook(linear, of_block))
        for hook in hooks:
            linear.register_forward_hook(hook)
        width = NUM_INPUTS // 2
        for x in make_data()[2]:
            linear(x[..., rank * width : (rank + 1) * width].contiguous())
        return [hook.accumulate() for hook in hooks]


def test_kv_heads_that_nobody_or_two_disagree_on_are_refused() -> None:
    import megascore.mcore

    linear = nn.Linear(NUM_INPUTS, NUM_OUTPUTS)
    model = nn.Module()
    model.attention = attention = nn.Module()
    attention.linear_proj = linear
    attention.config = SimpleNamespace(num_attention_heads=NUM_HEADS, num_query_groups=4)
    hook = megascore.mcore.MegatronIndependentKvHeadContributionHook
    with pytest.raises(HookStateError, match="the config of the projection has none. Give 'block_config'"):
        hook(linear)
    with pytest.raises(HookStateError, match="the attention has 4 and block_config has 2"):
        hook(linear, kv_settings(2, model))
    with pytest.raises(ModelError, match="8 query heads can't share 3 KV heads"):
        hook(linear, kv_settings(3, SimpleNamespace(config=SimpleNamespace(head_dim=HEAD_DIM))))
    with pytest.raises(ModelError, match="24 inputs, which are not those of 4 heads of 5"):
        hook(linear, kv_settings(2, SimpleNamespace(config=SimpleNamespace(head_dim=5))))
    with pytest.raises(HookStateError, match="24 inputs of the projection can't be shared by 5 KV heads"):
        hook(linear, kv_settings(5))
    of_model = hook(linear, {"model": model})
    x = torch.ones(SEQUENCE_LENGTH, BATCH_SIZE, NUM_INPUTS)
    of_model(linear, (x,), linear(x))
    assert len(of_model.accumulate()) == 4


@pytest.mark.parametrize("sequence", [False, True])
def test_the_norm_hook_gives_global_scores(sequence: bool, world: WorkerPool) -> None:
    norm = nn.RMSNorm(NUM_INPUTS, dtype=torch.float64)
    hook = LayerNormContributionHook(norm, None)
    norm.register_forward_hook(hook)
    for x in make_data()[2]:
        norm(x)
    for result in world.run(2, run_norm_hook, sequence):
        torch.testing.assert_close(result, hook.accumulate(), rtol=1e-12, atol=0)


def run_norm_hook(sequence: bool) -> Tensor:
    from megatron.core import parallel_state

    import megascore.mcore
    from megascore.mcore.world.parallel_world import parallel_world

    with parallel_world(ParallelConfig(tensor=2, sequence=sequence), CPU, timedelta(seconds=60)):
        norm = nn.RMSNorm(NUM_INPUTS, dtype=torch.float64)
        norm.weight.sequence_parallel = sequence
        hook = megascore.mcore.MegatronLayerNormContributionHook(norm, {})
        norm.register_forward_hook(hook)
        rank = parallel_state.get_tensor_model_parallel_rank()
        for x in make_data()[2]:
            norm(x.chunk(2)[rank] if sequence else x)
        return hook.accumulate()


def test_without_a_parallel_world_each_hook_is_its_parent() -> None:
    import megascore.mcore

    weight, bias, calls = make_data()
    linear = nn.Linear(NUM_INPUTS, NUM_OUTPUTS, dtype=torch.float64)
    linear.load_state_dict({"weight": weight, "bias": bias})
    pairs: list[tuple[Callable[[], ForwardHook], ForwardHook]] = [
        (megascore.mcore.MegatronL2NormHook, L2NormHook()),
        (
            lambda: megascore.mcore.MegatronIndependentChannelContributionHook(linear),
            IndependentChannelContributionHook(linear),
        ),
        (
            lambda: megascore.mcore.MegatronIterativeChannelContributionHook(linear, ITERATIVE),
            IterativeChannelContributionHook(linear, ITERATIVE),
        ),
    ]
    for make, parent in pairs:
        hook = make()
        for x in calls:
            hook(linear, (x,), linear(x))
            parent(linear, (x,), linear(x))
        torch.testing.assert_close(hook.accumulate(), parent.accumulate(), rtol=0, atol=0)

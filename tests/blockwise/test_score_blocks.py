"""`score_blockwise`: the scores of a full pass, whatever way a model calls its blocks. One process; small models."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import megascore
from megascore.capture import DeviceStore, HostStore, SpoolStore, TensorStore
from megascore.errors import MegascoreError, ModelError
from tests.blockwise.tiny_decoder import RETURNS, TinyDecoder, make_batches
from tests.mcore.oracle import ITERATIVE, all_scores
from tests.pool import WorkerPool

BOTH_MODES = pytest.mark.parametrize("cache_block_outputs", [True, False], ids=["cached", "fresh"])
EXACT = 1e-9
"""float64: only the order of additions may differ."""


def full_pass(model: nn.Module, batches: Sequence[Any], scores: Any) -> megascore.Scores:
    with megascore.attach(model, scores=scores) as run, torch.no_grad():
        for batch in batches:
            model(**batch) if isinstance(batch, dict) else model(batch)
            run.step()
    return run.finish()


def assert_same(found: megascore.Scores, expected: megascore.Scores) -> None:
    assert list(found) == list(expected)
    assert found.unseen == expected.unseen
    for key, value in expected.items():
        # A rank is the same or not at all.
        tolerance = 0 if ITERATIVE in key else EXACT
        torch.testing.assert_close(found[key], value, rtol=tolerance, atol=0, msg=key)
    for entry in ("num_tokens", "num_samples", "num_steps", "model", "layout", "sites", "scores"):
        assert found.metadata[entry] == expected.metadata[entry], entry


@BOTH_MODES
@pytest.mark.parametrize("by_keyword", [True, False], ids=["keyword", "positional"])
@pytest.mark.parametrize("returns", RETURNS)
def test_scores_are_those_of_a_full_pass(cache_block_outputs: bool, by_keyword: bool, returns: str) -> None:
    model, batches = TinyDecoder(returns=returns, by_keyword=by_keyword), make_batches()
    expected = full_pass(model, batches, all_scores(3))
    found = megascore.score_blockwise(
        model, None, batches, all_scores(3), cache_block_outputs=cache_block_outputs, metadata={"text": "mine"}
    )
    assert_same(found, expected)
    assert found.metadata["text"] == "mine"
    assert found.metadata["blockwise"] == {"cache_block_outputs": cache_block_outputs, "num_blocks": 4}


@BOTH_MODES
@pytest.mark.parametrize(
    "blocks",
    [
        "layers",
        lambda model: model.layers,
        lambda model: list(model.layers),
        lambda model: model.layers[1:3],
        lambda model: model.layers[2:3],
    ],
)
def test_blocks_can_be_given_in_several_ways_and_need_not_be_all(cache_block_outputs: bool, blocks: Any) -> None:
    model, batches = TinyDecoder(), make_batches()
    given = blocks if isinstance(blocks, str) else blocks(model)
    found = megascore.score_blockwise(model, given, batches, all_scores(3), cache_block_outputs=cache_block_outputs)
    assert_same(found, full_pass(model, batches, all_scores(3)))


@BOTH_MODES
def test_batches_can_be_mappings_and_come_from_a_generator(cache_block_outputs: bool) -> None:
    model = TinyDecoder()
    batches = [{"input_ids": batch, "offset": number} for number, batch in enumerate(make_batches())]
    found = megascore.score_blockwise(
        model, "layers", (batch for batch in batches), cache_block_outputs=cache_block_outputs
    )
    assert_same(found, full_pass(model, batches, None))


@BOTH_MODES
@pytest.mark.parametrize("name", ["device", "host", "spool", "spool with a budget"])
def test_inputs_can_wait_anywhere(cache_block_outputs: bool, name: str, tmp_path: Path) -> None:
    model, batches = TinyDecoder(), make_batches()
    budget = 3000 if "budget" in name else 0
    store: TensorStore = {"device": DeviceStore, "host": HostStore}.get(name, lambda: SpoolStore(tmp_path, budget))()
    found = megascore.score_blockwise(model, None, batches, cache_block_outputs=cache_block_outputs, store=store)
    assert_same(found, full_pass(model, batches, None))
    assert store.num_bytes == 0
    assert not list(tmp_path.rglob("*.safetensors"))


@BOTH_MODES
def test_a_block_that_works_in_place_is_scored_right(cache_block_outputs: bool) -> None:
    model, batches = TinyDecoder(), make_batches(2)
    # A layer that changes its input spoils the similarity of input and output in any kind of pass.
    scores = [{"target": "ffn", "method": ITERATIVE, "iterations": 2}, {"target": "attention_heads"}]
    expected = full_pass(model, batches, scores)
    for layer in model.layers:
        layer.in_place = True
    found = megascore.score_blockwise(model, None, batches, scores, cache_block_outputs=cache_block_outputs)
    assert_same(found, expected)


def test_each_block_runs_once_for_each_batch() -> None:
    model, batches = TinyDecoder(), make_batches()
    megascore.score_blockwise(model, None, batches)
    # The first tells, once, what blocks of its class return.
    assert [layer.num_calls for layer in model.layers] == [4, 3, 3, 3]


def test_only_what_is_needed_runs() -> None:
    model, batches = TinyDecoder(), make_batches()
    model.lm_head.register_forward_pre_hook(fail)
    megascore.score_blockwise(model, None, batches)
    model.norm.register_forward_pre_hook(fail)
    megascore.score_blockwise(model, None, batches, [{"target": "ffn"}])


def fail(*_: object) -> None:
    raise AssertionError("this module need not run")


@BOTH_MODES
def test_iterations_go_over_the_stored_inputs_of_a_block_again(cache_block_outputs: bool) -> None:
    model, batches = TinyDecoder(), make_batches()
    scores = [{"target": "ffn", "method": ITERATIVE, "iterations": 9}, *all_scores(3)[:2], *all_scores(3)[3:]]
    found = megascore.score_blockwise(model, None, batches, scores, cache_block_outputs=cache_block_outputs)
    num_calls = [layer.num_calls for layer in model.layers]
    iterative = full_pass(model, batches * 3, scores[:1])
    once = full_pass(model, batches, scores[1:])
    assert set(found) == set(iterative) | set(once)
    for key in found:
        expected = iterative if ITERATIVE in key else once
        torch.testing.assert_close(found[key], expected[key], rtol=0 if ITERATIVE in key else EXACT, atol=0)
    assert found.metadata["num_tokens"] == once.metadata["num_tokens"]
    if cache_block_outputs:
        assert num_calls == [10, 9, 9, 9]


@BOTH_MODES
def test_a_module_that_runs_twice_in_a_pass_is_warned_of_whatever_the_number_of_passes(
    cache_block_outputs: bool,
) -> None:
    model, batches = TinyDecoder(), make_batches()
    scores = [{"target": "ffn", "method": ITERATIVE, "iterations": 6}, {"target": "attention_heads"}]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # The sites of the iterative score see all tokens twice, the others once.
        megascore.score_blockwise(model, None, batches, scores, cache_block_outputs=cache_block_outputs)
    attention = model.layers[1].self_attn

    def run_again(module: nn.Module, args: Any, output: Tensor) -> None:
        attention.o_proj(output)

    attention.v_proj.register_forward_hook(run_again)
    num_tokens = sum(batch.numel() for batch in batches)
    told = rf"layers.1.self_attention.linear_proj has seen {2 * num_tokens} tokens, decoder.\S+ {num_tokens}:"
    with pytest.warns(UserWarning, match=told):
        megascore.score_blockwise(model, None, batches, scores, cache_block_outputs=cache_block_outputs)


@BOTH_MODES
def test_the_model_is_as_before_also_after_an_error(cache_block_outputs: bool) -> None:
    model, batches = TinyDecoder(), make_batches()
    model.train()
    model.layers[1].eval()
    model.config.use_cache = True
    modes = {name: module.training for name, module in model.named_modules()}
    state = {name: value.clone() for name, value in model.state_dict().items()}
    store = HostStore()

    def run(batches: list[Any]) -> None:
        megascore.score_blockwise(model, None, batches, cache_block_outputs=cache_block_outputs, store=store)

    run(batches)
    # The model's own error, at the last batch.
    with pytest.raises(IndexError):
        run([*batches, torch.tensor([[1000]])])
    handle = model.layers[2].mlp.up_proj.register_forward_pre_hook(fail)
    with pytest.raises(AssertionError, match="need not run"):
        run(batches)
    handle.remove()
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert model.config.use_cache is True
    assert store.num_bytes == 0
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        assert "forward" not in module.__dict__
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert_same(megascore.score_blockwise(model, None, batches), full_pass(model, batches, None))


@BOTH_MODES
@pytest.mark.parametrize("part", ["model", "blocks"])
def test_a_compiled_model_is_scored_as_it_was_written(cache_block_outputs: bool, part: str) -> None:
    model, batches = TinyDecoder(), make_batches()
    expected = full_pass(model, batches, None)
    compiled = torch.compile(model, backend="eager") if part == "model" else model
    for layer in model.layers if part == "blocks" else ():
        layer.compile(backend="eager")
    with torch.no_grad():
        compiled(batches[0])
    found = megascore.score_blockwise(compiled, None, batches, cache_block_outputs=cache_block_outputs)
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=EXACT, atol=0, msg=key)


def test_a_table_that_depends_on_hidden_states_is_refused_when_cached_and_right_when_fresh() -> None:
    model, batches = TinyDecoder(), make_batches()
    model.table_depends_on_hidden_states = True
    with pytest.raises(
        ModelError, match=r"argument of block 1 \(number 2\) depends on what blocks.*cache_block_outputs=F"
    ):
        megascore.score_blockwise(model, None, batches)
    found = megascore.score_blockwise(model, None, batches, cache_block_outputs=False)
    assert_same(found, full_pass(model, batches, None))


def test_work_between_blocks_is_refused_when_cached_and_right_when_fresh() -> None:
    model, batches = TinyDecoder(), make_batches()
    model.between = lambda x: x * 1.5
    with pytest.raises(ModelError, match="changes hidden states between block 0 and block 1: use cache"):
        megascore.score_blockwise(model, None, batches)
    found = megascore.score_blockwise(model, None, batches, cache_block_outputs=False)
    assert_same(found, full_pass(model, batches, None))


@pytest.mark.parametrize("sharded", [False, True], ids=["replicated", "FSDP"])
def test_data_parallel_ranks_add_up(world: WorkerPool, sharded: bool) -> None:
    expected = full_pass(TinyDecoder(), [torch.cat([batch, batch]) for batch in make_batches(2)], all_scores(2))
    for cache_block_outputs in (True, False):
        for found in world.run(2, score_part, 2, cache_block_outputs, sharded):
            assert found.keys() == set(expected)
            for key, value in found.items():
                torch.testing.assert_close(value, expected[key], rtol=0 if ITERATIVE in key else EXACT, atol=0)


def test_ranks_with_other_numbers_of_batches_are_told(world: WorkerPool) -> None:
    for message in world.run(2, score_part, 1, True, False):
        assert "ranks have [1, 2] batches" in message["error"]


def score_part(num_batches_of_first: int, cache_block_outputs: bool, sharded: bool) -> dict[str, Any]:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = TinyDecoder()
    if sharded:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for module in (*model.layers, model):
            fully_shard(module, mesh=mesh)
    batches: list[Tensor] = make_batches(2 if dist.get_rank() else num_batches_of_first)
    scores = all_scores(len(batches))
    try:
        return dict(megascore.score_blockwise(model, None, batches, scores, cache_block_outputs=cache_block_outputs))
    except MegascoreError as error:
        return {"error": str(error)}

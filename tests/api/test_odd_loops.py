"""`attach` in odd loops and on odd models: the scores are right, or the error says why not."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import megascore
from megascore.errors import ConfigError, DataError, HookStateError, ModelError
from megascore.scores.score_file import Scores
from tests.blockwise.tiny_decoder import TinyDecoder, make_batches
from tests.mcore.oracle import all_scores

Forward = Callable[[nn.Module, Tensor], object]


def call(model: nn.Module, batch: Tensor) -> object:
    return model(batch)


def score(model: nn.Module, forward: Forward = call, scores: list[dict[str, Any]] | None = None) -> Scores:
    batches = make_batches()
    with megascore.attach(model, scores=scores or all_scores(len(batches))) as run:
        for batch in batches:
            forward(model, batch)
            run.step()
    return run.finish()


@pytest.fixture(scope="module")
def expected() -> Scores:
    return score(TinyDecoder())


def assert_equal(actual: Scores, expected: Scores) -> None:
    assert list(actual) == list(expected)
    for key in expected:
        assert torch.equal(actual[key], expected[key]), key
    assert actual.metadata["num_tokens"] == expected.metadata["num_tokens"]


@pytest.fixture
def compiler() -> Any:
    torch.compiler.reset()
    with warnings.catch_warnings():
        # The compiler looks at gradients of tensors that have none, and has parts that are deprecated.
        warnings.simplefilter("ignore")
        yield torch.compile
    torch.compiler.reset()


@pytest.mark.parametrize("in_place", [False, True], ids=["torch.compile", "module.compile"])
def test_a_compiled_model_has_the_scores_of_the_eager_one(in_place: bool, compiler: Any) -> None:
    model: Any = TinyDecoder(num_layers=1)
    expected = score(model)
    if in_place:
        model.compile(backend="eager")
    else:
        model = compiler(model, backend="eager")
    # What is compiled by now calls no hooks.
    model(make_batches()[0])
    for _ in range(2):
        assert_equal(score(model), expected)


def test_a_function_compiled_around_the_model_has_the_scores_of_the_eager_one(compiler: Any) -> None:
    model = TinyDecoder(num_layers=1)
    # One hook, for each makes the compiler begin anew.
    wanted = [{"target": "ffn"}]
    expected = score(model, scores=wanted)
    compiled = compiler(lambda batch: model(batch), backend="eager")
    assert_equal(score(model, lambda _, batch: compiled(batch), wanted), expected)


def test_hooks_that_were_compiled_count_nothing_once_they_are_off(compiler: Any) -> None:
    model = TinyDecoder(num_layers=1)
    compiled = compiler(lambda batch: model(batch), backend="eager")
    batch = make_batches()[0]
    with megascore.attach(model, scores=[{"target": "ffn"}]) as run:
        compiled(batch)
    compiled(batch)
    assert run.finish().metadata["num_tokens"] == batch.numel()


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_what_a_backward_pass_computes_again_counts_once(use_reentrant: bool, expected: Scores) -> None:
    model = TinyDecoder()
    for layer in model.layers:
        own = layer.forward
        layer.forward = lambda *args, own=own, **kwargs: checkpoint(  # type: ignore[method-assign]
            lambda *inner: own(*inner, **kwargs), *args, use_reentrant=use_reentrant
        )
    assert_equal(score(model, lambda model, batch: model(batch).sum().backward()), expected)


@pytest.mark.parametrize("at_attach", [False, True])
@pytest.mark.parametrize("modes", [(True, True, True), (True, False, True), (False, True, False)])
def test_inference_mode_may_come_and_go(at_attach: bool, modes: tuple[bool, ...], expected: Scores) -> None:
    model = TinyDecoder()
    batches = make_batches()
    with torch.inference_mode() if at_attach else nullcontext():
        run = megascore.attach(model, scores=all_scores(len(batches)))
    with run:
        for batch, inference in zip(batches, modes, strict=True):
            with torch.inference_mode(inference), torch.no_grad():
                model(batch)
            run.step()
    assert_equal(run.finish(), expected)


def test_training_mode_in_the_loop_is_warned_of_once() -> None:
    model = TinyDecoder()
    first, *rest = make_batches()
    with megascore.attach(model, recipe="minitron"):
        with pytest.warns(UserWarning, match="training mode"):
            model.train()(first)
        for batch in rest:
            model.train()(batch)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=["first goes first", "last goes first"])
def test_two_runs_on_one_model_leave_it_as_it_was(order: tuple[int, int], expected: Scores) -> None:
    model = TinyDecoder().train()
    model.layers[1].eval()
    modes = [module.training for module in model.modules()]
    runs = [megascore.attach(model, scores=all_scores(3)) for _ in range(2)]
    for batch in make_batches():
        model(batch)
        for run in runs:
            run.step()
    runs[order[0]].close()
    assert not any(module.training for module in model.modules())
    runs[order[1]].close()
    runs[order[1]].close()
    assert [module.training for module in model.modules()] == modes
    for run in runs:
        assert_equal(run.finish(), expected)


def test_a_closed_run_cannot_be_entered_again() -> None:
    with megascore.attach(TinyDecoder()) as run:
        pass
    with pytest.raises(HookStateError, match="this run is closed"), run:
        pass


def test_a_forward_pass_that_ended_early_is_warned_of() -> None:
    model = TinyDecoder()
    first, second, _ = make_batches()
    with megascore.attach(model, recipe="minitron") as run:
        model(first)
        model.between = lambda x: 1 / 0  # type: ignore[assignment,return-value]
        with pytest.raises(ZeroDivisionError):
            model(second)
    seen = first.numel() + second.numel()
    with pytest.warns(UserWarning, match=rf"decoder.layers.0.\S+ has seen {seen} tokens, decoder.\S+ {first.numel()}:"):
        run.finish()


def test_modules_that_are_one_are_refused() -> None:
    model = TinyDecoder()
    model.layers[2].mlp = model.layers[1].mlp
    with pytest.raises(ModelError, match="decoder.layers.1.mlp.linear_fc2 and decoder.layers.2.mlp.linear_fc2 are one"):
        megascore.attach(model, recipe="minitron")
    model.layers[2].mlp = copy.deepcopy(model.layers[1].mlp)
    megascore.attach(model, recipe="minitron").close()


def test_weights_that_are_not_in_memory_are_refused() -> None:
    model = TinyDecoder()
    model.layers[1].to("meta")
    with pytest.raises(ModelError, match="layers.1 has no weights in memory"):
        megascore.attach(model, recipe="minitron")


@pytest.mark.parametrize("model", ["llama", None, [], [3]])
def test_what_is_no_model_is_refused(model: Any) -> None:
    with pytest.raises(ConfigError, match="the model is .*: expected a torch.nn.Module"):
        megascore.attach(model, recipe="minitron")


@pytest.mark.parametrize("scores", [3, {"target": "ffn"}])
def test_scores_that_are_no_list_are_refused(scores: Any) -> None:
    with pytest.raises(ConfigError, match="expected the name of a recipe .* or a list"):
        megascore.attach(TinyDecoder(), scores=scores)


def test_metadata_that_cannot_be_kept_is_refused_before_the_run() -> None:
    with pytest.raises(ConfigError, match="can't be written as JSON"):
        megascore.attach(TinyDecoder(), metadata={"data": object()})
    with pytest.raises(ConfigError, match="metadata has num_tokens, which the run writes itself"):
        megascore.attach(TinyDecoder(), metadata={"num_tokens": 5})
    with pytest.raises(ConfigError, match="metadata has blockwise, which the run writes itself"):
        megascore.attach(TinyDecoder(), metadata={"blockwise": 5})


def test_a_mask_that_is_no_tensor_is_refused() -> None:
    with (
        megascore.attach(TinyDecoder()) as run,
        pytest.raises(DataError, match="token mask is a list"),
        run.masked([[1, 1]]),  # type: ignore[arg-type]
    ):
        pass


def test_processes_that_know_nothing_of_each_other_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.warns(UserWarning, match=r"2 processes were started .*init_process_group"):
        megascore.attach(TinyDecoder(), scores=[{"target": "ffn"}]).close()
    with pytest.warns(UserWarning, match="takes itself for the only one"):
        megascore.score_blockwise(TinyDecoder(), None, make_batches(), [{"target": "ffn"}])

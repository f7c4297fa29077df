"""NaN and infinity are found at the step in which they come, by the first module that runs, on every way to score."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import megascore
from megascore.errors import HookStateError, ModelError
from megascore.hooks.registry import methods_of
from megascore.sites.requests import names_of_methods
from megascore.sites.targets import TARGETS
from tests.sites.plain_models import TOKENS, make_model

pytestmark = pytest.mark.fast

NUM_STEPS = 2


def spoil(model: nn.Module, name: str, value: float = float("nan")) -> None:
    with torch.no_grad():
        model.get_parameter(name).view(-1)[0] = value


def request_of(target: str, method: str) -> dict[str, Any]:
    options = {"iterations": NUM_STEPS} if "iterations" in methods_of(target)[method].options else {}
    return {"target": target, "method": method, **options}


def reads_activations(target: str, method: str) -> bool:
    hook = methods_of(target)[method].hook
    # What jobs measure is in tests/job/test_without_layers.py.
    return getattr(hook, "reads_activations") and not hook.needs_job  # noqa: B009 - one of ForwardHook's


DENSE = [(t, m) for t in TARGETS for m in names_of_methods(t) if "expert" not in t and reads_activations(t, m)]


@pytest.mark.parametrize(("target", "method"), DENSE, ids="/".join)
def test_each_score_names_the_layer_that_is_bad_at_its_step(target: str, method: str) -> None:
    model = make_model("llama")
    with megascore.attach(model, scores=[request_of(target, method)]) as run, torch.no_grad():
        model(TOKENS)
        run.step()
        for projection in ("mlp.up_proj", "self_attn.v_proj"):
            spoil(model, f"layers.1.{projection}.weight")
        model(TOKENS)
        # The first norm of the layer still runs on good numbers.
        with pytest.raises(ModelError, match=rf"^step 1: what decoder\.layers\.1\b.* for {target}/{method} is NaN"):
            run.step()
        assert run.num_steps == 1


def test_the_first_module_that_runs_is_named_and_not_the_first_by_name() -> None:
    model = make_model("llama")
    # decoder.final_layernorm, and layers.1.input_layernorm before its mlp, come first in the alphabet.
    spoil(model, "layers.0.mlp.up_proj.weight")
    with megascore.attach(model, recipe="minitron") as run, torch.no_grad():
        model(TOKENS)
        with pytest.raises(ModelError, match=r"what decoder\.layers\.0\.mlp\.linear_fc2 gives for ffn/l2_norm"):
            run.step()


def test_numbers_that_are_too_large_are_found_too() -> None:
    model = make_model("llama").float()
    spoil(model, "layers.1.mlp.up_proj.weight", float("inf"))
    with megascore.attach(model, recipe="minitron") as run, torch.no_grad():
        model(TOKENS)
        with pytest.raises(ModelError, match=r"layers\.1\.mlp\.linear_fc2 .* NaN or infinite"):
            run.step()


def test_what_a_mask_leaves_out_may_be_anything() -> None:
    model = make_model("llama")
    mask = torch.ones_like(TOKENS)
    mask[:, -1] = 0
    down: Any = model.layers
    handle = down[0].mlp.register_forward_pre_hook(_with_a_bad_last_token)
    with megascore.attach(model, scores=[{"target": "ffn"}]) as run, torch.no_grad(), run.masked(mask):
        down[0].mlp(torch.randn(2, 6, 32).double())
        run.step()
    handle.remove()
    assert run.num_steps == 1


def _with_a_bad_last_token(_: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    changed = args[0].clone()
    changed[:, -1] = float("nan")
    return (changed,)


@pytest.mark.parametrize("cached", [True, False])
def test_block_by_block_scoring_finds_it_as_well(cached: bool) -> None:
    model = make_model("llama")
    spoil(model, "layers.0.mlp.up_proj.weight")
    scores = [{"target": "ffn", "method": "iterative_contribution", "iterations": 2}]
    with pytest.raises(ModelError, match=r"step 0: what decoder\.layers\.0\.mlp\.linear_fc2"):
        megascore.score_blockwise(model, None, [TOKENS, TOKENS], scores, cache_block_outputs=cached)


@pytest.mark.parametrize("method", ["independent_contribution", "iterative_contribution", "l2_norm"])
def test_a_hook_alone_gives_no_ranks_for_what_is_not_a_number(method: str) -> None:
    layer = nn.Linear(8, 4, bias=False)
    request = request_of("ffn", method)
    hook_class: Any = methods_of("ffn")[method].hook
    hook = {
        "l2_norm": lambda: hook_class(),
        "independent_contribution": lambda: hook_class(layer),
        "iterative_contribution": lambda: hook_class(
            layer, {"validation_full_iters": request.get("iterations"), "clear_gpu_memory": False}
        ),
    }[method]()
    inputs = torch.randn(3, 2, 8)
    for step in range(NUM_STEPS):
        inputs[0, 0, 0] = float("nan") if step == 0 else 1.0
        hook(layer, (inputs,), layer(inputs).detach())
    with pytest.raises(HookStateError, match="NaN"):
        hook.accumulate()

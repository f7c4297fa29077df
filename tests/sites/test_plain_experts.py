"""Routed experts of transformers models against a loop over single tokens in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import megascore
from megascore.errors import DataError, ModelError
from megascore.sites.plain import PlainModelView
from tests.sites.plain_models import FOUR_EXPERTS, MODELS, SIZES, TOKENS, make_model

pytestmark = pytest.mark.fast

MIXTURES = ("mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3", "olmoe", "ernie4_5_moe", "qwen2_moe")
ROUNDING = {"rtol": 1e-9, "atol": 1e-12}
"""Both sides are float64; only the order of sums differs."""
EXPERT_SCORES = [{"target": "experts"}, {"target": "expert_ffn"}]


def experts_of(model: nn.Module) -> dict[int, Any]:
    """Return the experts of each layer that has some."""
    layers: Any = model.layers
    return {number: layer.mlp.experts for number, layer in enumerate(layers) if hasattr(layer.mlp, "experts")}


@torch.no_grad()
def oracle(experts: Any, model_type: str, calls: list[tuple[Tensor, ...]], keep: Tensor) -> tuple[Tensor, Tensor]:
    """Return the scores of experts [E] and of their channels [E, F], one token and one expert after the other."""
    num_experts = experts.down_proj.shape[0]
    norms, tokens, squares = [0.0] * num_experts, [0] * num_experts, [torch.zeros(()).double()] * num_experts
    for hidden, index, weights in calls:
        for token in keep.flatten().nonzero().flatten().tolist():
            for expert, weight in zip(index[token].tolist(), weights[token], strict=True):
                if model_type == "gpt_oss":
                    first = hidden[token] @ experts.gate_up_proj[expert] + experts.gate_up_proj_bias[expert]
                    gate, up = first[::2].clamp(max=7.0), first[1::2].clamp(-7.0, 7.0)
                    inside = (up + 1) * gate * torch.sigmoid(1.702 * gate)
                    output = inside @ experts.down_proj[expert] + experts.down_proj_bias[expert]
                else:
                    gate, up = (experts.gate_up_proj[expert] @ hidden[token]).chunk(2)
                    inside = functional.silu(gate) * up
                    output = experts.down_proj[expert] @ inside
                norms[expert] += float((weight * output).norm())
                squares[expert] = squares[expert] + (weight * inside) ** 2
                tokens[expert] += 1
    means = torch.tensor([norm / max(count, 1) for norm, count in zip(norms, tokens, strict=True)], dtype=torch.float64)
    return means, torch.stack([value.sqrt().expand(experts_width(experts)) for value in squares])


def experts_width(experts: Any) -> int:
    return int(experts.down_proj.shape[1 if experts.is_transposed else 2])


def make_mixture(model_type: str, **changes: Any) -> nn.Module:
    sizes = {**FOUR_EXPERTS, "moe_num_experts": 4, "moe_k": 2, "moe_layer_start_index": 1, "moe_intermediate_size": 24}
    own = {**sizes, **MODELS.get(model_type, {})}
    return make_model(model_type, **own, **changes) if model_type in MODELS else _other(model_type, own)


def _other(model_type: str, sizes: dict[str, Any]) -> nn.Module:
    from transformers import AutoConfig, AutoModel

    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **{**SIZES, **sizes})
    model: nn.Module = AutoModel.from_config(config, experts_implementation="eager").double().eval()
    return model


@pytest.mark.parametrize("masked", [False, True], ids=["all tokens", "a mask"])
@pytest.mark.parametrize("model_type", MIXTURES)
def test_scores_are_those_of_a_loop_over_tokens(model_type: str, masked: bool) -> None:
    model = make_mixture(model_type)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    calls: dict[int, list[tuple[Tensor, ...]]] = {}
    for layer, experts in experts_of(model).items():
        seen = calls.setdefault(layer, [])
        experts.register_forward_pre_hook(lambda module, args, seen=seen: seen.append(args))
    keep = torch.ones_like(TOKENS, dtype=torch.bool)
    if masked:
        keep[0, 4:] = False
    with torch.no_grad(), megascore.attach(model, scores=EXPERT_SCORES) as run, run.masked(keep if masked else None):
        model(TOKENS)
        run.step()
    scores = run.finish()
    assert calls
    for layer, experts in experts_of(model).items():
        means, channels = oracle(experts, model_type, calls[layer], keep)
        key = f"decoder.layers.{layer}.mlp.experts"
        used = scores.metadata["sites"][f"{key}/experts/router_weighted_norm"]["tokens_per_expert"]
        assert sum(used) == int(keep.sum()) * 2
        for expert, count in enumerate(used):
            if count:
                torch.testing.assert_close(scores[f"{key}/experts"][expert], means[expert], **ROUNDING)
                inside = scores[f"{key}.{expert}.linear_fc2/expert_ffn"]
                torch.testing.assert_close(inside, channels[expert], **ROUNDING)


@pytest.mark.parametrize("implementation", ["batched_mm", "grouped_mm"])
def test_scores_do_not_depend_on_how_the_library_runs_its_experts(implementation: str) -> None:
    found = []
    for chosen in ("eager", implementation):
        model = make_mixture("qwen3_moe").float()
        config: Any = model.config
        config._experts_implementation = chosen
        for layer in experts_of(model).values():
            layer.config._experts_implementation = chosen
        with torch.no_grad(), megascore.attach(model, scores=EXPERT_SCORES) as run:
            model(TOKENS)
        found.append(run.finish())
    assert list(found[0]) == list(found[1])
    for key in found[0]:
        # float32, rounded in another order on the way through two layers.
        torch.testing.assert_close(found[0][key], found[1][key], rtol=1e-4, atol=1e-7)


def test_sizes_of_experts_are_facts_of_the_model() -> None:
    facts = PlainModelView(make_mixture("qwen2_moe")).facts
    told = {name: facts[name] for name in ("num_experts", "experts_per_token", "expert_ffn_size")}
    assert told == {"num_experts": 4, "experts_per_token": 2, "expert_ffn_size": 24}
    assert facts["shared_expert_ffn_size"] > 0


def test_a_module_that_does_something_else_with_its_experts_is_refused() -> None:
    model = make_mixture("mixtral")
    experts = experts_of(model)[1]
    forward = experts.forward
    experts.forward = lambda *args: 2 * forward(*args)
    with torch.no_grad(), megascore.attach(model, scores=EXPERT_SCORES), pytest.raises(ModelError, match="Leave exp"):
        model(TOKENS)


def test_experts_that_do_not_say_how_they_are_kept_are_named_and_not_guessed() -> None:
    model = make_mixture("mixtral")
    for experts in experts_of(model).values():
        del experts.is_transposed
    view = PlainModelView(model)
    assert view.unknown == [f"decoder.layers.{number}.mlp.experts: MixtralExperts" for number in (0, 1)]


def test_a_mask_of_another_batch_is_refused() -> None:
    model = make_mixture("mixtral")
    with torch.no_grad(), megascore.attach(model, scores=EXPERT_SCORES) as run, pytest.raises(DataError, match="mask"):
        run.token_mask = torch.ones(3, 5, dtype=torch.bool)
        model(TOKENS)


def test_files_merge_though_other_experts_were_reached_in_each() -> None:
    model = make_mixture("mixtral")
    asked = [*EXPERT_SCORES, {"target": "experts", "method": "output_variance"}]

    def scores_of(*batches: Tensor) -> megascore.Scores:
        with torch.no_grad(), megascore.attach(model, scores=asked) as run:
            for batch in batches:
                model(batch)
                run.step()
        return run.finish()

    # Two experts for a token: of four, two at least are unreached.
    first, second = TOKENS[:1, :1], TOKENS[:1, 3:4]
    one, other, both = scores_of(first), scores_of(second), scores_of(first, second)
    assert one.unseen != other.unseen
    merged = megascore.merge([one, other])
    assert merged.unseen == both.unseen
    assert merged.keys() == both.keys()
    for key, value in both.items():
        torch.testing.assert_close(merged[key], value, **ROUNDING, msg=key)
    means = {key: state for key, state in merged.statistics.items() if key.endswith("output_variance")}
    assert means
    for key, state in means.items():
        assert state["sum_of_outputs"].shape == (4, SIZES["hidden_size"]), key

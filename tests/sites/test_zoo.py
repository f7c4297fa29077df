"""Every text family: what is scored and what is named are together what the model has, each where it stands.

Tier: one process. The walk over the modules, the positions of norms and the formulas share no code with the package.
"""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.version import Version
from torch import Tensor, nn

import megascore
from megascore.errors import ModelError
from megascore.sites.places import Place
from megascore.sites.plain import PlainModelView
from megascore.sites.targets import PlaceKind
from tests.sites.plain_models import TOKENS, l2_norm, record
from tests.sites.zoo import PARTLY, REFUSED, WHOLLY, ZOO, build

PAGE = Path(megascore.__file__).parent / "api" / "README.md"
MAKES_INPUTS = re.compile(
    # Embeddings and heads; what makes the inputs of a scored projection; routers; norms of queries, keys and low ranks.
    r"(.*\.)?(embed_tokens|\w+_embeddings|lm_head|lm_head\..*|pooler\.dense|query|key|value|query_key_value|\w*qkv\w*|"
    r"(q|k|v|kv)(_[ab])?_proj|kv_a_proj_with_mqa|gate_proj|up_proj|gate_up_proj|c_fc|fc1|dense_h_to_4h|intermediate\.dense|"
    r"[qk]_norm|[qk]_layernorm|(q|kv)_a_layernorm|(attn|ffn)_sub_norm|mlp\.(gate|router|router\.gate|shared_expert_gate)|"
    r"mlp\.gate\.moe_statics|block_sparse_moe\.router(\..*)?)"
)
PER_HEAD_OR_EXPERT = ("sinks", "expert_bias", "e_score_correction_bias", "act_fn.alpha_p", "act_fn.alpha_n")
"""Parameters with one number for each head or expert, or for the whole module."""


def has_channels(module: nn.Module) -> bool:
    own = [w for name, w in module._parameters.items() if w is not None and name not in PER_HEAD_OR_EXPERT]
    return any(weight.numel() > 1 for weight in own) or "Norm" in type(module).__name__


@pytest.fixture(scope="module", params=ZOO)
def model(request: pytest.FixtureRequest) -> tuple[str, nn.Module]:
    import transformers
    from transformers import CONFIG_MAPPING

    if request.param not in CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {request.param}")
    if request.param.startswith("granitemoe") and Version(transformers.__version__) < Version("5.14"):
        pytest.skip("transformers before 5.14 has granitemoe's experts in linear layers of their own (5.10 has)")
    return request.param, build(request.param)


def test_each_module_is_scored_or_named_or_makes_what_is_scored(model: tuple[str, nn.Module]) -> None:
    model_type, module = model
    view = PlainModelView(module)
    assert bool(view.unknown) == (model_type in PARTLY)
    layer_path = view.places[0].local_name.rpartition(".")[0]
    named = [re.sub(r"^decoder\.layers", layer_path, name.split(": ")[0]) for name in view.unknown]
    assert len(named) == len(set(named))
    scored = {place.local_name for place in view.places if place.kind is not PlaceKind.LAYER}
    for name, part in module.named_modules():
        if has_channels(part):
            is_named = any(f"{name}.".startswith(f"{outer}.") for outer in named)
            # A parameter of its own is named beside what its module is.
            is_named = is_named or any(outer.startswith(f"{name}.") for outer in named)
            assert name in scored or is_named or MAKES_INPUTS.fullmatch(name), name
            assert not (name in scored and name in named), name


def test_norms_stand_where_their_names_say(model: tuple[str, nn.Module]) -> None:
    model_type, module = model
    view = PlainModelView(module)
    inputs, outputs = record(module)
    for place in view.places:
        found = re.fullmatch(r"decoder\.layers\.(\d+)\.(\w+)", place.name)
        # BERT's layers add the residual inside of what has the norm.
        if place.kind is not PlaceKind.NORM or found is None or model_type in ("bert", "roberta", "electra"):
            continue
        layer = place.local_name.removesuffix(place.local_name.split(f".{found[1]}.", 1)[1])
        attention, mlp = (_first(inputs, layer, names) for names in (("self_attn",), ("mlp", "block_sparse_moe")))
        if found[2] == "input_layernorm":
            assert attention is None or torch.equal(outputs[place.local_name], inputs[attention]), place.name
        elif found[2] == "pre_mlp_layernorm":
            assert mlp is not None
            assert torch.equal(outputs[place.local_name].flatten(), inputs[mlp].flatten()), place.name
        elif found[2] == "post_self_attn_layernorm":
            assert attention is not None
            assert torch.equal(inputs[place.local_name], outputs[attention]), place.name
        else:
            assert found[2] == "post_mlp_layernorm", place.name
            assert mlp is not None
            assert torch.equal(inputs[place.local_name], outputs[mlp]), place.name


def test_scores_are_the_formulas_on_what_ran(model: tuple[str, nn.Module]) -> None:
    _, module = model
    inputs, outputs = record(module)
    view = PlainModelView(module)
    targets = {place.kind for place in view.places}
    wanted = {
        "ffn": PlaceKind.FFN_PROJECTION,
        "shared_expert_ffn": PlaceKind.SHARED_EXPERT_PROJECTION,
        "hidden_size": PlaceKind.NORM,
        "attention_heads": PlaceKind.ATTENTION_PROJECTION,
        "layers": PlaceKind.LAYER,
    }
    l2_norm = {"method": "l2_norm"}
    scores = [
        {"target": target, **(l2_norm if target != "layers" else {})}
        for target, kind in wanted.items()
        if kind in targets
    ]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="megascore does not know these modules")
        run = megascore.attach(module, scores=scores)
    with run, torch.no_grad():
        module(TOKENS)
        run.step()
    found = run.finish()
    for target, kind in wanted.items():
        for place in (place for place in view.places if place.kind is kind and target != "layers"):
            expected = _expected(place, target, inputs, outputs, module)
            # float64: only the order of additions differs.
            torch.testing.assert_close(found[f"{place.name}/{target}"], expected, rtol=1e-12, atol=0)


def _expected(
    place: Place, target: str, inputs: dict[str, Tensor], outputs: dict[str, Tensor], module: nn.Module
) -> Tensor:
    if target == "hidden_size":
        return l2_norm(_batched(outputs[place.local_name]))
    channels = l2_norm(_batched(inputs[place.local_name]))
    if target != "attention_heads":
        return channels
    config: Any = module.config
    return channels.view(config.num_attention_heads, -1).norm(dim=1)


def _batched(activations: Tensor) -> Tensor:
    # Shared experts of some models are given the tokens of all samples in one row.
    return activations if activations.dim() == 3 else activations.view(*TOKENS.shape, -1)


def _first(inputs: dict[str, Tensor], layer: str, names: tuple[str, ...]) -> str | None:
    return next((f"{layer}{name}" for name in names if f"{layer}{name}" in inputs), None)


@pytest.mark.parametrize("model_type", REFUSED)
def test_families_that_are_not_known_are_refused_with_what_they_have(model_type: str) -> None:
    with pytest.raises(ModelError, match=r"has no 'layers' .* \(found: "):
        megascore.attach(build(model_type, "meta"))


def test_the_page_has_the_families_as_they_were_found_here() -> None:
    rows = dict(re.findall(r"^\| `?([^|`]+?)`? \| (.+?) \|$", PAGE.read_text(), re.M))
    assert rows["all"] == ", ".join(sorted(WHOLLY))
    assert rows["refused"] == ", ".join(sorted(REFUSED))
    assert {name: what for name, what in rows.items() if name in PARTLY} == PARTLY

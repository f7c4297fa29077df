"""Every module of a transformers model is scored under the name of where it stands, known to need no score, or named.

Where a norm stands is found by what runs: its output is the input of attention or MLP, or its input their output.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import megascore
from megascore.errors import ModelError
from megascore.scores.ranking import rankings
from megascore.sites.plain import PlainModelView
from megascore.sites.targets import PlaceKind
from tests.blockwise.tiny_decoder import TinyDecoder, make_batches
from tests.sites.plain_models import MODELS, TOKENS, l2_norm, make_model, record

UNKNOWN = {"qwen3_next": ["decoder.layers.0.linear_attn: Qwen3NextGatedDeltaNet"]}
NO_SITES = re.compile(
    r"(.*\.)?(embed_tokens|(word|position|token_type)_embeddings|pooler\.dense|\w*[qkv]_(\w+_)?proj(_with_mqa)?|"
    r"qkv_proj|query|key|value|gate_proj|up_proj|gate_up_proj|intermediate\.dense|[qk]_norm|(q|kv)_a_layernorm|"
    r"(attn|ffn)_sub_norm|mlp\.(gate|router|shared_expert_gate))"
)
"""Names of what has channels that are scored elsewhere, written down again."""

BEFORE_ATTENTION, BEHIND_ATTENTION = "input_layernorm", "post_self_attn_layernorm"
BEFORE_MLP, BEHIND_MLP = "pre_mlp_layernorm", "post_mlp_layernorm"
ONLY_BEFORE, ONLY_BEHIND = (BEFORE_ATTENTION, BEFORE_MLP), (BEHIND_ATTENTION, BEHIND_MLP)
POSITIONS = {
    **dict.fromkeys(MODELS, ONLY_BEFORE),
    "cohere": (BEFORE_ATTENTION,),
    **dict.fromkeys(("olmo2", "olmo3", "exaone4", "bert"), ONLY_BEHIND),
    **dict.fromkeys(("gemma2", "gemma3_text", "glm4"), (*ONLY_BEFORE, *ONLY_BEHIND)),
}


@contextmanager
def told(names: list[str]) -> Iterator[None]:
    """Expect one warning that names what has no score, or none."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    texts = [str(warning.message) for warning in caught if "scores nothing" in str(warning.message)]
    assert len(texts) == bool(names)
    for name in names:
        assert re.sub(r"layers\.\d+", "layers.*", name) in re.sub(r"layers\.\d+", "layers.*", texts[0])


@pytest.mark.parametrize("model_type", MODELS)
def test_every_module_is_scored_known_or_named(model_type: str) -> None:
    model = make_model(model_type)
    view = PlainModelView(model)
    assert view.unknown == UNKNOWN.get(model_type, [])
    scored = {place.local_name for place in view.places if place.kind is not PlaceKind.LAYER}
    named = [name.split(": ")[0].replace("decoder.layers", "layers") + "." for name in view.unknown]
    for name, module in model.named_modules():
        # The sinks of an attention are a weight for each head.
        own = {key: weight for key, weight in module._parameters.items() if weight is not None and key != "sinks"}
        if "Norm" not in type(module).__name__ and all(weight.numel() == 1 for weight in own.values()):
            continue
        is_named = any(f"{name}.".startswith(outer) for outer in named)
        ways = [name in scored, is_named or NO_SITES.fullmatch(name) is not None]
        assert sum(ways) == 1, (name, ways)


@pytest.mark.parametrize("model_type", MODELS)
def test_norms_have_the_names_of_where_they_stand(model_type: str) -> None:
    model = make_model(model_type)
    places = [place for place in PlainModelView(model).places if place.kind is PlaceKind.NORM]
    names = [place.name for place in places if place.name.startswith("decoder.layers.")]
    expected = {f"decoder.layers.{number}.{position}" for number in (0, 1) for position in POSITIONS[model_type]}
    assert sorted(names) == sorted(expected)
    inputs, outputs = record(model)
    # BERT adds the residual inside of what has its norm.
    for place in places if model_type != "bert" else ():
        _, _, layer, position = f"{place.name}...".split(".")[:4]
        if not position:
            continue
        parts = ("self_attn", "linear_attn") if position in (BEFORE_ATTENTION, BEHIND_ATTENTION) else ("mlp",)
        part = next(name for name in (f"layers.{layer}.{part}" for part in parts) if name in inputs)
        if position in ONLY_BEFORE:
            assert torch.equal(outputs[place.local_name], inputs[part]), place.name
        else:
            assert torch.equal(inputs[place.local_name], outputs[part]), place.name


@pytest.mark.parametrize("model_type", MODELS)
def test_scores_are_the_formulas_on_what_the_modules_gave(model_type: str) -> None:
    model = make_model(model_type)
    inputs, outputs = record(model)
    with told(UNKNOWN.get(model_type, [])):
        run = megascore.attach(model, recipe="minitron")
    with run, torch.no_grad():
        model(TOKENS)
        run.step()
    scores, norms, config = run.finish(), [], model.config
    for place in run.view.places:
        if place.kind is PlaceKind.NORM:
            norms.append(l2_norm(outputs[place.local_name]))
            assert_equal(scores[f"{place.name}/hidden_size"], norms[-1])
        if place.kind is PlaceKind.ATTENTION_PROJECTION:
            width = getattr(config, "v_head_dim", None) or getattr(config, "head_dim", None) or 8
            heads = l2_norm(inputs[place.local_name]).view(config.num_attention_heads, width).norm(dim=1)
            assert_equal(scores[f"{place.name}/attention_heads"], heads)
        if place.kind is PlaceKind.FFN_PROJECTION:
            assert_equal(scores[f"{place.name}/ffn"], l2_norm(inputs[place.local_name]))
    # Written out once more, without the view: all norms as wide as the hidden states, but those of queries and keys.
    wide = [
        name
        for name, module in model.named_modules()
        if "Norm" in type(module).__name__
        and outputs[name].shape[-1] == 32
        and not name.endswith(("q_norm", "k_norm", "_sub_norm", "linear_attn.norm"))
    ]
    assert len(wide) == len(norms)
    assert_equal(scores["decoder/hidden_size"], sum((l2_norm(outputs[name]) for name in wide), torch.zeros(32)))


def test_multi_latent_attention_has_no_shared_kv_heads() -> None:
    with pytest.raises(ModelError, match="target 'kv_heads' matches no module"):
        megascore.attach(make_model("deepseek_v3"), scores=[{"target": "kv_heads"}])


def test_a_layer_with_fewer_heads_than_the_model_has_as_many_scores() -> None:
    model = make_model("llama")
    narrow: Any = make_model("llama", num_attention_heads=2, num_key_value_heads=1, head_dim=8)
    model.layers[1].self_attn = narrow.layers[1].self_attn
    with megascore.attach(model, scores=[{"target": "attention_heads"}, {"target": "kv_heads"}]) as run:
        model(TOKENS)
    scores = run.finish()
    projection = "decoder.layers.{}.self_attention.linear_proj"
    assert [len(scores[f"{projection.format(n)}/attention_heads"]) for n in (0, 1)] == [4, 2]
    assert [len(scores[f"{projection.format(n)}/kv_heads"]) for n in (0, 1)] == [2, 1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda attention: setattr(attention, "o_proj", nn.Linear(20, 32)), "has 20 inputs, .* 2 heads of 8"),
        (lambda attention: setattr(attention, "num_heads", 3), "has 32 inputs, .* 3 heads of 8"),
        (lambda attention: setattr(attention, "v_proj", nn.Linear(32, 24)), "4 query heads can't share 3 KV heads"),
    ],
)
def test_heads_that_do_not_fit_the_projection_are_refused_with_both_numbers(change: Any, message: str) -> None:
    model = make_model("llama")
    change(model.layers[1].self_attn)
    with pytest.raises(ModelError, match=rf"decoder\.layers\.1\.self_attention\.linear_proj.*{message}"):
        megascore.attach(model, recipe="minitron")


def test_norms_of_unknown_positions_are_named_and_not_guessed() -> None:
    model = make_model("llama")
    for layer in model.layers:
        layer.third_norm = nn.RMSNorm(32)
    names = ("input_layernorm: LlamaRMSNorm", "post_attention_layernorm: LlamaRMSNorm", "third_norm: RMSNorm")
    assert PlainModelView(model).unknown == [f"decoder.layers.{n}.{name}" for n in (0, 1) for name in names]
    with pytest.warns(UserWarning, match=r"scores nothing.*decoder\.layers\.\*\.third_norm: RMSNorm \(2 layers\)"):
        run = megascore.attach(model, recipe="minitron")
    with run:
        model(TOKENS)
    assert [key for key in run.finish() if "hidden_size" in key] == [
        "decoder.final_layernorm/hidden_size/l2_norm",
        "decoder/hidden_size/l2_norm",
    ]


def test_what_stands_outside_of_the_layers_is_named() -> None:
    model = make_model("llama")
    model.tower = make_model("bert")
    assert PlainModelView(model).unknown == ["tower: BertModel"]


def test_a_model_of_which_nothing_is_known_is_refused_by_names() -> None:
    model = make_model("llama")
    for layer in model.layers:
        layer.mlp = nn.Identity()
    model.extra = nn.Linear(2, 2)
    with pytest.raises(ModelError, match="target 'ffn' matches no module .* extra: Linear"):
        megascore.attach(model, scores=[{"target": "ffn"}])


def assert_equal(value: Tensor, expected: Tensor) -> None:
    # float64: only the order of additions differs.
    torch.testing.assert_close(value, expected.double(), rtol=1e-12, atol=0)


def test_a_site_tells_in_how_many_groups_its_heads_compete_where_the_config_says_another_number() -> None:
    model, batches = TinyDecoder(), make_batches()
    for kv_heads, told in ((2, 4), (4, None)):
        model.config.num_key_value_heads = kv_heads
        with megascore.attach(model, scores=[{"target": "attention_heads"}]) as run, torch.no_grad():
            for batch in batches:
                model(batch)
                run.step()
        scores = run.finish()
        blockwise = megascore.score_blockwise(model, None, batches, [{"target": "attention_heads"}])
        for found in (scores, blockwise):
            assert {site.get("groups") for site in found.metadata["sites"].values()} == {told}
            # Its layers have as many values as queries.
            assert {ranking.groups for ranking in rankings(found)} == {1}


def test_what_has_no_score_stands_in_the_score_file() -> None:
    model = make_model("llama")
    extra: Any = model
    extra.layers[1].mixer = nn.Linear(32, 32).double()
    with told(["decoder.layers.1.mixer: Linear"]):
        run = megascore.attach(model, recipe="minitron")
    with run, torch.no_grad():
        model(TOKENS)
    assert run.finish().metadata["not_scored"] == {"decoder.layers.1.mixer": "Linear"}

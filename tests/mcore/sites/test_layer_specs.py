"""Megatron's own layer specs: each module with channels is scored where it stands, or named, in each of them."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import megascore
from megascore.sites.targets import PlaceKind
from tests.mcore.sites import odd_models
from tests.mcore.sites.test_odd_models import parallel_world
from tests.pool import WorkerPool

MAKES_SCORED_CHANNELS = (
    r"(self_attention\.(linear_qkv|linear_q_proj|linear_q_down_proj|linear_q_up_proj|linear_kv_down_proj|"
    r"linear_kv_up_proj|q_layernorm|k_layernorm|kv_layernorm)|mlp\.(linear_fc1|router|shared_experts\.linear_fc1)|"
    r"mlp\.experts\.local_experts\.\d+\.linear_fc1)"
)
"""Modules of a layer whose outputs are the inputs of what is scored, or are of heads' or ranks' width."""
AROUND = r"(embedding\..*|output_layer)"


def plain(**options: Any) -> Any:
    return odd_models._gpt(_config(), [odd_models._layer_spec(**options)] * 2)


def experts() -> Any:
    config = _config(
        num_moe_experts=4, moe_router_topk=2, moe_ffn_hidden_size=24, moe_shared_expert_intermediate_size=8
    )
    return odd_models._gpt(config, [odd_models._layer_spec(num_experts=4), odd_models._layer_spec()])


def normalized_queries() -> Any:
    from megascore.mcore.compat import submodules_of
    from megascore.mcore.models.spec import TorchNorm

    layer = odd_models._layer_spec(qk_layernorm=True)
    attention = submodules_of(layer.submodules.self_attention)
    attention.q_layernorm = attention.k_layernorm = TorchNorm
    return odd_models._gpt(_config(qk_layernorm=True), [layer] * 2)


def t5() -> Any:
    from megatron.core.models.T5 import t5_spec
    from megatron.core.models.T5.t5_model import T5Model

    from megascore.mcore.models.spec import TorchNorm

    blocks = t5_spec.get_t5_encoder_with_local_block_spec(2), t5_spec.get_t5_decoder_with_local_block_spec(2)
    for block in blocks:
        block.layer_norm = TorchNorm
        for layer in block.layer_specs:
            odd_models._with_torch_norms(layer)
    for layer in blocks[1].layer_specs:
        layer.submodules.pre_cross_attn_layernorm = TorchNorm
    return T5Model(
        config=_config(),
        encoder_config=_config(),
        transformer_encoder_layer_spec=blocks[0],
        transformer_decoder_layer_spec=blocks[1],
        vocab_size=odd_models.VOCAB,
        max_sequence_length=odd_models.SEQUENCE,
    )


def bert() -> Any:
    from megatron.core.models.bert.bert_layer_specs import bert_layer_local_spec

    return odd_models._gpt(_config(), [odd_models._with_torch_norms(copy.deepcopy(bert_layer_local_spec))] * 2)


def _config(**options: Any) -> Any:
    from megatron.core.transformer.transformer_config import TransformerConfig

    return TransformerConfig(**odd_models.SIZES, **options)


MODELS: dict[str, tuple[Callable[[], Any], str | None, set[str]]] = {
    "local": (plain, None, set()),
    "local with norms of queries and keys": (normalized_queries, None, set()),
    "experts and a shared one": (experts, None, set()),
    "multi-latent attention": (odd_models.latent_attention, None, set()),
    "layers that differ": (odd_models.mixed_layers, None, {"ColumnParallelLinearGathered"}),
    "BERT": (bert, None, set()),
    "token prediction": (odd_models.with_token_prediction, None, {"MultiTokenPredictionBlock"}),
    "encoder of T5": (t5, "encoder", set()),
    "decoder of T5": (t5, "decoder", {"CrossAttention"}),
    "language model of two towers": (odd_models.two_towers, "language_model", set()),
}
"""How each is built, the part that is scored, and the classes that are named as not scored."""


@pytest.mark.parametrize("name", MODELS)
def test_each_module_with_channels_is_scored_where_it_stands_or_named(name: str, world: WorkerPool) -> None:
    missing, twice, displaced, named = world.run(1, look_at, name)[0]
    assert not missing
    assert not twice
    assert not displaced
    assert named == MODELS[name][2]


def look_at(name: str) -> tuple[list[str], list[str], list[str], set[str]]:
    """What is neither scored nor named, what is both, what has another place's name, and the classes named."""
    build, part, _ = MODELS[name]
    with parallel_world():
        model = build()
        scored_part = model.get_submodule(part) if part else model
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            run = megascore.attach(model, part=part)
        run.close()
        places = {place.local_name: place.name for place in run.view.places}
        unknown = dict(text.split(": ", 1) for text in run.view.unknown)
        walked = {own: position_of(own) for own in modules_with_channels(scored_part)}
        stack = {own: global_name for own, global_name in walked.items() if not re.fullmatch(AROUND, own)}
        named = {
            own for own, position in stack.items() if any(f"{position}.".startswith(f"{path}.") for path in unknown)
        }
        made = {
            own
            for own, position in stack.items()
            if re.fullmatch(r"decoder\.layers\.\d+\." + MAKES_SCORED_CHANNELS, position)
        }
        return (
            sorted(stack.keys() - named - made - places.keys()),
            sorted(named & places.keys()),
            sorted(own for own in stack.keys() & places.keys() if not same_place(places[own], stack[own])),
            {what.split(", ")[0] for what in unknown.values()},
        )


def modules_with_channels(model: nn.Module) -> list[str]:
    return [
        name
        for name, module in model.named_modules()
        if any(weight is not None and weight.numel() > 1 for weight in module._parameters.values())
    ]


def position_of(name: str) -> str:
    """Name of a module in the stack of layers, which is called ``decoder`` whatever holds it."""
    return re.sub(r"^(?=layers\.|final_layernorm)", "decoder.", name)


def same_place(name: str, position: str) -> bool:
    return name == position.replace(".local_experts.", ".")


def test_the_stacks_of_an_encoder_decoder_are_named_with_the_way_to_choose(world: WorkerPool) -> None:
    text = world.run(1, refusal)[0]
    assert "several stacks of layers ('encoder', 'decoder')" in text
    assert "attach(model, part='decoder')" in text


def refusal() -> str:
    with parallel_world(), pytest.raises(megascore.errors.ModelError) as caught:
        megascore.attach(t5())
    return str(caught.value)


@pytest.mark.parametrize("name", MODELS)
def test_each_score_is_that_of_the_modules_own_tensors(name: str, world: WorkerPool) -> None:
    expected, scores = world.run(1, score, name)[0]
    assert expected
    assert scores.keys() == expected.keys()
    for key, value in scores.items():
        # Sums of float64 in another order.
        torch.testing.assert_close(value, expected[key], rtol=1e-9, atol=1e-12, msg=key)


def score(name: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Scores by formulas on what goes into and comes out of each scored module, and those of the run."""
    build, part, _ = MODELS[name]
    wanted = [{"target": target} for target in ("ffn", "hidden_size", "layers")]
    wanted.append({"target": "attention_heads", "method": "l2_norm"})
    with parallel_world():
        torch.manual_seed(3)
        model = build().double()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            run = megascore.attach(model, part=part, scores=wanted)
        seen: dict[str, tuple[Tensor, Tensor]] = {}
        scored = model.get_submodule(part) if part else model
        for place in run.view.places:

            def keep(_: nn.Module, args: Any, kwargs: Any, output: Any, path: str = place.local_name) -> None:
                inputs = args[0] if args else kwargs["hidden_states"]
                seen[path] = inputs.double(), (output[0] if isinstance(output, tuple) else output).double()

            place.module.register_forward_hook(keep, with_kwargs=True)
        forward(model, scored, name)
        run.step()
        expected = {}
        for place in run.view.places:
            if place.local_name not in seen:
                continue
            key, value = formula(place, *seen[place.local_name])
            if key is not None:
                expected[key] = value
        similarity = [expected.pop(key) for key in sorted(key for key in expected if key.endswith("block_similarity"))]
        scores = dict(run.finish())
        scores = {key: value for key, value in scores.items() if key != "decoder/hidden_size/l2_norm"}
        expected["decoder/layers/block_similarity"] = torch.stack(similarity)
        return expected, scores


@torch.no_grad()
def forward(model: Any, scored: Any, name: str) -> None:
    tokens = torch.arange(2 * odd_models.SEQUENCE).view(2, -1) * 7 % odd_models.VOCAB
    if name.endswith("T5"):
        mask = torch.zeros(2, 1, odd_models.SEQUENCE, odd_models.SEQUENCE, dtype=torch.bool)
        model(tokens, tokens.flip(1), mask, mask, mask)
        return
    runs = scored if name == "language model of two towers" else model
    labels = {"labels": tokens} if name == "token prediction" else {}
    runs(tokens, torch.arange(odd_models.SEQUENCE).expand(2, -1), None, **labels)


def formula(place: Any, inputs: Tensor, outputs: Tensor) -> tuple[str | None, Tensor]:
    """Key and value of a site's score; tensors are [S, B, C]."""
    kind = place.kind
    if kind is PlaceKind.LAYER:
        cosine = torch.nn.functional.cosine_similarity(inputs, outputs, dim=-1)
        return f"{place.name}/layers/block_similarity", 1 - cosine.mean()
    values = outputs if kind is PlaceKind.NORM else inputs
    channels = values.abs().mean(0).square().sum(0).sqrt()
    if kind is PlaceKind.NORM:
        return f"{place.name}/hidden_size/l2_norm", channels
    if kind is PlaceKind.FFN_PROJECTION:
        return f"{place.name}/ffn/l2_norm", channels
    if kind is PlaceKind.ATTENTION_PROJECTION:
        return f"{place.name}/attention_heads/l2_norm", channels.view(place.num_heads, -1).norm(dim=1)
    return None, channels

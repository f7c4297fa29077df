"""Models with several stacks of layers: the language model's is scored, or what is there is named."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import megascore
from megascore.errors import ModelError
from megascore.sites.plain import PlainModelView
from megascore.sites.towers import find_tower, part_of
from tests.sites.plain_models import SIZES, TOKENS, make_model

pytestmark = pytest.mark.fast


def make_llava() -> nn.Module:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2, image_size=8, patch_size=4
    )
    torch.manual_seed(0)
    return LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=LlamaConfig(**SIZES))).eval()


class TwoTowers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = make_model("llama"), make_model("qwen2")


def test_of_a_vision_and_a_language_model_the_language_model_is_scored() -> None:
    model = make_llava()
    assert find_tower(model).path == "model.language_model.layers"
    with pytest.warns(UserWarning, match=r"scores nothing in them: .*vision_tower"):
        run = megascore.attach(model, recipe="minitron")
    with run, torch.no_grad():
        model(TOKENS)
    scores = run.finish()
    assert len(scores["decoder/layers"]) == 2
    assert len(scores["decoder.layers.0.mlp.linear_fc2/ffn"]) == SIZES["intermediate_size"]
    assert scores.metadata["model"]["hidden_size"] == SIZES["hidden_size"]
    assert any(name.startswith("model.vision_tower") for name in scores.metadata["not_scored"])


def test_the_decoder_of_an_encoder_decoder_is_scored_and_the_encoder_named() -> None:
    from transformers import T5GemmaConfig, T5GemmaForConditionalGeneration, T5GemmaModuleConfig

    part: dict[str, Any] = {**SIZES, "head_dim": 8, "layer_types": ["sliding_attention", "full_attention"]}
    config = T5GemmaConfig(
        encoder=T5GemmaModuleConfig(**part), decoder=T5GemmaModuleConfig(**{**part, "intermediate_size": 40})
    )
    model = T5GemmaForConditionalGeneration(config)
    view = PlainModelView(model)
    assert find_tower(model).path == "model.decoder.layers"
    assert view.facts["ffn_hidden_size"] == 40
    assert any(name.startswith("model.encoder") for name in view.unknown)


def test_towers_of_which_none_is_the_language_model_are_named_with_how_to_choose() -> None:
    model = TwoTowers()
    with pytest.raises(ModelError, match=r"\(first\.layers, second\.layers\).* attach\(model, part='second'\)"):
        megascore.attach(model, recipe="minitron")
    with megascore.attach(model, part="second") as run, torch.no_grad():
        model.second(TOKENS)
    scores = run.finish()
    assert len(scores["decoder/layers"]) == 2
    assert scores.metadata["part"] == "second"


def test_a_part_that_is_not_there_is_refused_with_those_that_are() -> None:
    with pytest.raises(ModelError, match=r"has no part 'third'. Parts of that depth: first, second"):
        part_of(TwoTowers(), "third")


@pytest.mark.parametrize("model_type", ["bart", "distilbert"])
def test_models_of_other_names_are_refused_by_what_they_have(model_type: str) -> None:
    from transformers import AutoConfig, AutoModel

    sizes = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
    sizes |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "vocab_size": 64}
    sizes |= {"dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4}
    model = AutoModel.from_config(AutoConfig.for_model(model_type, **sizes))
    with pytest.raises(ModelError, match=r"It has, of kinds that are not known: decoder\.layers\.\*"):
        megascore.attach(model, recipe="minitron")

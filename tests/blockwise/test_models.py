"""`score_blockwise` on models of transformers: tiny random ones of several families, in memory and from their files."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import megascore
from megascore.blockwise.empty_model import empty_model
from megascore.blockwise.moving_weights import MovingWeights
from megascore.errors import DataError, ModelError
from tests.blockwise.test_score_blocks import BOTH_MODES, assert_same, full_pass
from tests.mcore.oracle import ITERATIVE, all_scores
from tests.models import SIZES, cache_keyword, load_with_transformers, save_checkpoint

SLIDING = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"] * 2}
MODELS: dict[str, dict[str, Any]] = {
    "gemma3_text": {"head_dim": 16, **SLIDING},
    "gemma2": {"head_dim": 16, "query_pre_attn_scalar": 16, **SLIDING},
    "qwen2": {"use_sliding_window": True, "max_window_layers": 0, **SLIDING},
    "bert": {"hidden_act": "gelu"},
}
"""Families and their settings; in the first three each second layer sees only the last four tokens."""


def build(family: str) -> nn.Module:
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**SIZES, **deepcopy(MODELS[family])})
    return (AutoModel if family == "bert" else AutoModelForCausalLM).from_config(config).double()


def make_batches(padded: bool) -> list[dict[str, Tensor]]:
    """Batches of other lengths, the first with padding on the right."""
    generator = torch.Generator().manual_seed(0)
    batches = [{"input_ids": torch.randint(3, 128, (2, 12 + n), generator=generator)} for n in range(3)]
    if padded:
        batches[0]["attention_mask"] = torch.ones(2, 12, dtype=torch.int64)
        # Fewer than the window has, so that every token sees another one.
        batches[0]["attention_mask"][1, -3:] = 0
    return batches


@BOTH_MODES
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("family", MODELS)
def test_every_family_is_scored_as_by_a_full_pass(family: str, padded: bool, cache_block_outputs: bool) -> None:
    model, batches = build(family), make_batches(padded)
    found = megascore.score_blockwise(model, None, batches, all_scores(3), cache_block_outputs=cache_block_outputs)
    assert_same(found, full_pass(model, batches, all_scores(3)))


@BOTH_MODES
def test_padding_does_not_count_where_a_mask_says_so(cache_block_outputs: bool) -> None:
    model, batches = build("qwen2"), make_batches(True)
    masks = [batch.get("attention_mask") for batch in batches]
    with megascore.attach(model, recipe="minitron") as run, torch.no_grad():
        for batch, mask in zip(batches, masks, strict=True):
            with run.masked(mask):
                model(**batch)
            run.step()
    expected = run.finish()
    options = {"cache_block_outputs": cache_block_outputs, "token_masks": masks}
    found = megascore.score_blockwise(model, None, batches, "minitron", **options)
    assert_same(found, expected)
    assert found.metadata["num_tokens"] == sum(batch["input_ids"].numel() for batch in batches) - 3
    with pytest.raises(DataError, match="2 token masks for 3 batches"):
        megascore.score_blockwise(model, None, batches, token_masks=masks[:2])


def test_the_models_here_have_layers_of_both_kinds() -> None:
    """A sliding layer must matter, or the test above would not see a mask that went to the wrong layer."""
    for family in ("gemma3_text", "gemma2", "qwen2"):
        model, batches = build(family), make_batches(False)
        before = full_pass(model, batches, None)["decoder/layers"]
        model.config.layer_types[1] = "sliding_attention"
        swapped = full_pass(model, batches, None)["decoder/layers"]
        assert not torch.allclose(before, swapped, rtol=1e-6), family


def test_an_encoder_has_its_own_norms() -> None:
    scores = megascore.score_blockwise(build("bert"), None, make_batches(False))
    norms = {key.split("/")[0] for key in scores if "/hidden_size/" in key}
    layers = {f"decoder.layers.{n}.post_{part}_layernorm" for n in range(4) for part in ("self_attn", "mlp")}
    assert norms == {"decoder", "embedding.layernorm", *layers}
    assert len(scores["decoder.layers.2.self_attention.linear_proj/attention_heads"]) == 4


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@BOTH_MODES
def test_a_checkpoint_is_scored_block_by_block(family: str, cache_block_outputs: bool, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    # The first has tied embeddings, the second none; small files, so that a block comes from several.
    folder = save_checkpoint(tmp_path / family, family, max_shard_size="40KB")
    assert len(list(folder.glob("*.safetensors"))) > 3
    batches = make_batches(False)
    model = AutoModelForCausalLM.from_pretrained(folder)
    found = megascore.score_blockwise(folder, None, batches, all_scores(3), cache_block_outputs=cache_block_outputs)
    expected = full_pass(model, batches, all_scores(3))
    assert list(found) == list(expected)
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=0 if ITERATIVE in key else 1e-5, atol=0, msg=key)


def test_a_model_without_weights_has_them_while_they_are_needed(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path / "llama", "llama")
    model = empty_model(folder)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert not any(buffer.is_meta for buffer in model.buffers())
    assert model.lm_head.weight is model.model.embed_tokens.weight
    weights = MovingWeights(model, "cpu", folder)
    own = dict(model.named_parameters())
    with pytest.raises(KeyError), weights.present(model.model.layers[1], model.lm_head):
        real = {name for name, parameter in model.named_parameters(remove_duplicate=False) if not parameter.is_meta}
        assert {name.split(".")[2] for name in real if "layers" in name} == {"1"}
        assert "lm_head.weight" in real
        raise KeyError
    assert {name: id(p) for name, p in model.named_parameters()} == {name: id(p) for name, p in own.items()}
    assert all(parameter.is_meta for parameter in model.parameters())


def test_at_most_one_block_has_weights_at_a_time(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path / "llama", "llama")
    model = empty_model(folder)
    layers = model.model.layers
    seen = []

    def look(*_: object) -> None:
        seen.append([number for number, layer in enumerate(layers) if not layer.mlp.up_proj.weight.is_meta])

    for layer in layers:
        layer.mlp.register_forward_pre_hook(look)
    megascore.score_blockwise(model, None, make_batches(False), weights=folder)
    assert seen == [[0], *([n] for n in range(4) for _ in range(3))]
    seen.clear()
    megascore.score_blockwise(model, None, make_batches(False)[:1], cache_block_outputs=False, weights=folder)
    assert seen == [[n] for block in range(4) for n in range(block + 1)] + [[n] for n in range(4)]


def test_a_dtype_of_the_model_wins_over_that_of_the_file(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path / "llama", "llama")
    model = empty_model(folder).to(torch.float64)
    found = megascore.score_blockwise(model, None, make_batches(False), weights=folder)

    expected = full_pass(load_with_transformers(folder, torch.float64), make_batches(False), None)
    # The rotary table of the one was made in float32 and cast, as every part of it was.
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-5, atol=0, msg=key)
    assert next(iter(found.values())).dtype == torch.float64


def test_a_buffer_without_content_is_refused(tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = save_checkpoint(tmp_path / "llama", "llama")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    with pytest.raises(ModelError, match="no content for . tensors .*rotary_emb.inv_freq.*must be real"):
        megascore.score_blockwise(model, None, make_batches(False), weights=folder)


def test_a_generation_cache_of_the_caller_is_refused() -> None:
    from transformers import DynamicCache

    model: Any = build("qwen2")
    keyword = cache_keyword(model.model.layers[0])
    batches = [{**batch, cache_keyword(model): DynamicCache(), "use_cache": True} for batch in make_batches(False)]
    for cached in (True, False):
        with pytest.raises(ModelError, match=f"given a cache .{keyword} is a DynamicCache.: leave it out"):
            megascore.score_blockwise(model, None, batches, cache_block_outputs=cached)

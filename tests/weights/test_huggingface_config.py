"""Reading config.json, in the layouts that transformers has had. Tier: pure."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megascore.errors import ModelError
from megascore.weights.architecture import Experts
from megascore.weights.huggingface.config import HuggingFaceModelConfig, read_config
from tests.models import SIZES

LLAMA3 = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def write(directory: Path, model_type: str, **values: Any) -> Path:
    raw = {"model_type": model_type, **SIZES, **values}
    (directory / "config.json").write_text(json.dumps({key: value for key, value in raw.items() if value != "absent"}))
    return directory


def rotary(config: HuggingFaceModelConfig) -> tuple[float, float | None, float | None]:
    """Return the base, and the factors of Llama 3's scaling and of linear interpolation where they are on."""
    gpt = config.architecture.gpt
    return (
        gpt["rotary_base"],
        gpt["rope_scaling_factor"] if gpt["rope_scaling"] else None,
        gpt["seq_len_interpolation_factor"],
    )


@pytest.mark.parametrize(
    "values",
    [
        {"rope_parameters": {"rope_theta": 5e5, "factor": 32.0, **LLAMA3}},
        {"rope_theta": 5e5, "rope_scaling": {"factor": 32.0, **LLAMA3}},
    ],
    ids=["transformers 5", "transformers 4"],
)
def test_rotary_settings_are_found_where_each_version_puts_them(tmp_path: Path, values: dict[str, Any]) -> None:
    config = read_config(write(tmp_path, "llama", **values))
    assert rotary(config) == (5e5, 32.0, None)


def test_linear_scaling_under_its_old_key_is_read(tmp_path: Path) -> None:
    config = read_config(write(tmp_path, "llama", rope_scaling={"type": "linear", "factor": 4.0}))
    assert rotary(config) == (10000.0, None, 4.0)


def test_what_an_old_config_leaves_out_is_as_transformers_has_it(tmp_path: Path) -> None:
    config = read_config(write(tmp_path, "llama", num_key_value_heads="absent", head_dim=None))
    assert (config.architecture.num_kv_heads, config.head_dim, rotary(config)) == (4, 16, (10000.0, None, None))
    assert not config.tied_embeddings
    assert read_config(write(tmp_path, "qwen3")).head_dim == 128


@pytest.mark.parametrize(
    ("model_type", "attention_bias", "expected"),
    [
        ("llama", False, (False, False, False)),
        ("llama", True, (True, True, False)),
        ("mistral", False, (False, False, False)),
        ("qwen2", False, (True, False, False)),
        ("qwen3", False, (False, False, True)),
        ("qwen3", True, (True, True, True)),
    ],
)
def test_families_differ_in_biases_and_norms(
    tmp_path: Path, model_type: str, attention_bias: bool, expected: tuple[bool, ...]
) -> None:
    config = read_config(write(tmp_path, model_type, attention_bias=attention_bias))
    assert (config.qkv_bias, config.attention_output_bias, config.qk_norm) == expected


@pytest.mark.parametrize(
    ("model_type", "values", "window", "layers"),
    [
        ("mistral", {"sliding_window": 16}, 16, "1111"),
        ("mistral", {"sliding_window": "absent"}, 4096, "1111"),
        ("mistral", {"sliding_window": None}, None, "0000"),
        ("qwen2", {"sliding_window": 16, "use_sliding_window": False}, None, "0000"),
        ("qwen2", {"sliding_window": 16, "use_sliding_window": True, "max_window_layers": 3}, 16, "0001"),
        ("qwen2", {"sliding_window": 16, "use_sliding_window": True, "max_window_layers": 4}, None, "0000"),
        (
            "qwen3",
            {
                "sliding_window": 16,
                "use_sliding_window": True,
                "layer_types": ["sliding_attention", "full_attention"] * 2,
            },
            16,
            "1010",
        ),
    ],
)
def test_sliding_windows_are_in_the_layers_that_have_them(
    tmp_path: Path, model_type: str, values: dict[str, Any], window: int | None, layers: str
) -> None:
    model = read_config(write(tmp_path, model_type, **values)).architecture
    assert model.sliding_window == window
    assert "".join(str(int(slides)) for slides in model.sliding_layers) == layers


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"model_type": "gpt2"},
            r"model_type 'gpt2' is not supported; supported: llama, mistral, mixtral, qwen2, qwen3, qwen3_moe",
        ),
        ({"hidden_act": "gelu"}, r"hidden_act=gelu is not supported; supported: silu"),
        ({"hidden_size": "absent"}, r"config.json: hidden_size is None: expected a whole number"),
        ({"vocab_size": 0}, r"vocab_size is 0"),
        ({"quantization_config": {"quant_method": "gptq"}}, r"quantized checkpoints are not supported"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, r"rotary scaling 'yarn' is not supported"),
        (
            {"rope_parameters": {**LLAMA3, "factor": 8.0, "original_max_position_embeddings": 4096}},
            r"'llama3' with original_max_position_embeddings=4096 is not supported: Megatron-Core has 8192",
        ),
        ({"partial_rotary_factor": 0.5}, r"partial_rotary_factor=0.5 is not supported"),
        (
            {"sliding_window": 8, "use_sliding_window": True, "layer_types": ["x"]},
            r"layer_types is \['x'\]: expected 4",
        ),
    ],
)
def test_what_megatron_cannot_do_is_refused_by_name(tmp_path: Path, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        read_config(write(tmp_path, **{"model_type": "qwen2", **values}))


def test_a_folder_that_is_no_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"nowhere not found: model\.hf expects"):
        read_config(tmp_path / "nowhere")
    with pytest.raises(ModelError, match=r"has no config\.json"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match=r"config\.json cannot be read as JSON"):
        read_config(tmp_path)


MIXTRAL = {"model_type": "mixtral", "num_local_experts": 4}
QWEN3_MOE = {"model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}


def test_the_number_of_experts_is_read_under_both_names(tmp_path: Path) -> None:
    for key in ("num_experts", "num_local_experts"):
        model = read_config(write(tmp_path, **{**QWEN3_MOE, "num_experts": "absent", key: 6})).architecture
        assert model.experts == Experts(num_experts=6, ffn_size=32, layers=(True,) * 4)
        # Weights of a token's experts are those of a softmax over all experts, as norm_topk_prob is not set.
        assert (model.transformer["moe_router_topk"], model.transformer["moe_router_pre_softmax"]) == (2, True)
    assert read_config(write(tmp_path, "llama")).architecture.experts is None


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({**MIXTRAL, "num_experts_per_tok": 5}, r"num_experts_per_tok=5 is more than the model's 4 experts"),
        ({**MIXTRAL, "num_experts_per_tok": 1}, r"num_experts_per_tok=1 with weights that sum to one"),
        ({**MIXTRAL, "num_local_experts": "four"}, r"num_local_experts is 'four': expected a whole number"),
        ({**QWEN3_MOE, "mlp_only_layers": [0, 1, 2, 3]}, r"mlp_only_layers=\[0, 1, 2, 3\] leave no layer with experts"),
        ({**QWEN3_MOE, "attention_bias": True}, r"attention_bias=True is not supported"),
    ],
)
def test_experts_that_megatron_cannot_have_are_refused(tmp_path: Path, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        read_config(write(tmp_path, **values))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"model_type": "mistral", "layer_types": ["sliding_attention", "full_attention"]},
            "layer_types is .*ministral",
        ),
        ({"model_type": "mistral", "use_sliding_window": False}, "use_sliding_window is false and sliding_window 4096"),
        ({"model_type": "mixtral", "use_sliding_window": False, "sliding_window": 8}, "use_sliding_window is false"),
        ({"model_type": "mistral", "sliding_window": 0}, "sliding_window"),
        ({"model_type": "llama", "is_causal": False}, "is_causal=False is not supported"),
        (
            {
                "model_type": "llama",
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
                "rope_scaling": {"rope_type": "linear", "factor": 2.0},
            },
            "rope_parameters is .* and rope_scaling .*: keep the one",
        ),
        ({"model_type": "llama", "tie_word_embeddings": "false"}, "tie_word_embeddings is 'false'"),
    ],
)
def test_what_contradicts_transformers_is_refused_by_its_key(
    tmp_path: Path, values: dict[str, Any], message: str
) -> None:
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2} if values["model_type"] == "mixtral" else {}
    with pytest.raises(ModelError, match=message):
        read_config(write(tmp_path, **{**experts, **values}))


def test_a_window_of_null_needs_no_other_key(tmp_path: Path) -> None:
    values: dict[str, Any] = {"sliding_window": None, "use_sliding_window": False}
    assert read_config(write(tmp_path, "mistral", **values)).architecture.sliding_window is None

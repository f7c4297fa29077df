"""The model that a checkpoint says it is of. Tier: real Megatron on the CPU, one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from megascore.config import ModelConfig
from megascore.errors import ModelError
from megascore.mcore.models.checkpoint_args import architecture_from_args
from megascore.mcore.models.choose import model_source
from megascore.weights.torch_dist.checkpoint import MegatronCheckpoint
from megascore.weights.torch_dist.run_config import RENAMED
from tests.mcore.models.test_megatron_checkpoint_errors import load
from tests.mcore.torch_dist import Colour, training_args

ARGUMENTS: dict[str, tuple[dict[str, Any], str]] = {
    "latent attention": ({"multi_latent_attention": True}, r"multi_latent_attention=True is not supported: .*provider"),
    "hybrid": ({"hybrid_override_pattern": "M-M*"}, r"hybrid_override_pattern=M-M\* is not supported"),
    "positions": (
        {"position_embedding_type": "yarn"},
        r"position_embedding_type=yarn is not supported; supported: rope",
    ),
    "no layers": ({"num_layers": None}, r"args in .*common\.pt: num_layers is None: expected a whole number"),
    "a class": ({"normalization": Colour.RED}, r"normalization is a .*Colour, which is not read: expected a plain"),
    "odd experts": (
        {"num_experts": 4, "moe_layer_freq": [1]},
        r"moe_layer_freq=\[1\]: expected one entry for each of 2",
    ),
    "future": (
        {"glu_linear_offset": 1.0, "no_rope_freq": "x" * 3},
        r"Megatron-Core does not build this Megatron model",
    ),
    "scaled parametrization": ({"use_mup": True}, r"use_mup=True is not supported: .*provider"),
    "softmax": (
        {"softmax_type": "off-by-one"},
        r"softmax_type=off-by-one is not supported; supported: vanilla\. .*provider",
    ),
    "balancing": (
        {"moe_router_load_balancing_type": ["aux_loss", "sinkhorn"]},
        r"moe_router_load_balancing_type=sinkhorn is not supported; supported: aux_loss",
    ),
    "more tokens": (
        {"vocab_size": 129},
        r"'embedding\.word_embeddings\.weight' in .* has 128 tokens, but args in .*common\.pt says 129",
    ),
    "window": ({"window_size": (4, 4)}, r"window_size=\(4, 4\) is not supported"),
}


@pytest.mark.parametrize("case", ARGUMENTS)
def test_arguments_that_are_not_supported_are_named(case: str, saved: Path, folder: Path) -> None:
    changes, message = ARGUMENTS[case]
    torch.save({"args": training_args(saved / "hf", **changes)}, folder / "common.pt")
    with pytest.raises(ModelError, match=message):
        load(ModelConfig(load=str(folder)))


def test_arguments_give_the_model_that_they_describe(saved: Path, folder: Path) -> None:
    changes = {
        "swiglu": False,
        "squared_relu": True,
        "num_experts": 4,
        "moe_layer_freq": 2,
        "moe_router_load_balancing_type": ["seq_aux_loss"],
        "softmax_type": "vanilla",
        "window_size": (7, 0),
        "window_attn_skip_freq": 2,
        "group_query_attention": False,
    }
    torch.save({"args": training_args(saved / "hf", **changes)}, folder / "common.pt")
    found = architecture_from_args(MegatronCheckpoint(folder))
    assert found.experts is not None
    assert (found.experts.num_experts, found.experts.ffn_size, found.experts.layers) == (4, 96, (True, False))
    # Megatron counts layers from 1 for windows, and the keys before the query.
    assert (found.sliding_window, found.sliding_layers) == (8, (True, False))
    assert found.num_kv_heads == 4
    assert found.transformer["activation_func"].__name__ == "squared_relu"
    assert not found.transformer["gated_linear_unit"]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"vocab_size": 100}, 100),
        ({"vocab_size": 100, "tokenizer_type": "HuggingFaceTokenizer"}, 100),
        # All rows, as in Megatron's own loss: nothing tells which are tokens.
        ({"vocab_size": None}, 128),
        ({}, 128),
        ({"vocab_size": 100, "tokenizer_type": "NullTokenizer"}, 128),
    ],
)
def test_arguments_say_how_many_rows_of_the_embedding_are_tokens(
    changes: dict[str, Any], expected: int, saved: Path, folder: Path
) -> None:
    torch.save({"args": training_args(saved / "hf", **changes)}, folder / "common.pt")
    assert architecture_from_args(MegatronCheckpoint(folder)).vocab_size == expected


def test_a_checkpoint_that_does_not_say_what_it_is_names_both_ways_out(folder: Path) -> None:
    torch.save({"iteration": 10}, folder / "common.pt")
    with pytest.raises(
        ModelError, match=r"no run_config\.yaml, and .*common\.pt no 'args'.* model\.hf .* model\.provider"
    ):
        model_source(ModelConfig(load=str(folder)))


def write_run_config(saved: Path, folder: Path, **changes: Any) -> None:
    """Keep what Megatron-Bridge keeps, in place of Megatron-LM's args; read off its sources, not from a run of it."""
    args = vars(training_args(saved / "hf"))
    renamed = {new: args[old] for old, new in RENAMED.items() if old in args}
    model = {
        **{name: value for name, value in args.items() if not isinstance(value, torch.dtype)},
        **renamed,
        "_target_": "megatron.bridge.models.qwen.qwen_provider.Qwen3ModelProvider",
        "gated_linear_unit": True,
        "activation_func": {"_target_": "torch.nn.functional.silu", "_call_": False},
        "params_dtype": {"_target_": "torch.bfloat16", "_call_": False},
        "share_embeddings_and_output_weights": False,
    }
    for name in (*RENAMED, "swiglu", "group_query_attention", "untie_embeddings_and_output_weights"):
        model.pop(name, None)
    (folder / "run_config.yaml").write_text(yaml.safe_dump({"model": {**model, **changes}, "train": {}}))
    torch.save({"iteration": 10}, folder / "common.pt")


def test_the_config_that_megatron_bridge_keeps_says_the_same(saved: Path, folder: Path) -> None:
    by_args = architecture_from_args(MegatronCheckpoint(folder))
    write_run_config(saved, folder)
    assert architecture_from_args(MegatronCheckpoint(folder)) == by_args
    load(ModelConfig(load=str(folder), dtype="float32"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"_target_": "a.Gemma2ModelProvider"},
            r"a model made by a\.Gemma2ModelProvider is not supported: .* model\.hf",
        ),
        ({"_target_": "a.Llama31NemotronNano8BProvider"}, r"made by a\.Llama31Nemotron"),
        ({"transformer_layer_spec": {"_target_": "mine.spec"}}, r"transformer_layer_spec=mine\.spec is not supported"),
        ({"gated_linear_unit": False}, r"activation_func=silu with gated_linear_unit=False is not supported"),
        ({"layernorm_zero_centered_gamma": True}, r"run_config\.yaml: apply_layernorm_1p=True is not supported"),
    ],
)
def test_a_model_that_megatron_bridge_makes_otherwise_is_refused(
    changes: dict[str, Any], message: str, saved: Path, folder: Path
) -> None:
    write_run_config(saved, folder, **changes)
    with pytest.raises(ModelError, match=message):
        architecture_from_args(MegatronCheckpoint(folder))


def test_a_config_that_is_not_plain_yaml_is_refused(folder: Path) -> None:
    torch.save({"iteration": 10}, folder / "common.pt")
    (folder / "run_config.yaml").write_text("model: !!python/object/apply:os.system ['true']")
    with pytest.raises(ModelError, match=r"run_config\.yaml cannot be read as Megatron-Bridge writes it"):
        architecture_from_args(MegatronCheckpoint(folder))

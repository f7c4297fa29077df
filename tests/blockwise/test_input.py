"""Bad input to `score_blockwise`, and what it says. One process; small models."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import megascore
from megascore.capture import SpoolStore, stores
from megascore.errors import ConfigError, DataError, ModelError
from tests.blockwise.tiny_decoder import TinyDecoder, make_batches
from tests.mcore.oracle import ITERATIVE

pytestmark = pytest.mark.fast


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        ("decoder.layers", r"TinyDecoder has no blocks 'decoder.layers'.*its lists of modules: layers \(4\)"),
        ("norm", r"'norm' is a LayerNorm, not a sequence of blocks; its lists of modules: layers \(4\)"),
        (lambda model: model.norm, "blocks is a LayerNorm, not a sequence of blocks"),
        (lambda model: 3, "blocks is a int: expected modules in a sequence"),
        (lambda model: [], "there are no blocks"),
        (lambda model: [model.layers[0], nn.Linear(1, 1)], r"block 1 \(Linear\) is not a module of the model"),
        (lambda model: [model.layers[0], "layers.1"], r"block 1 \(str\) is not a module of the model"),
        (lambda model: [*model.layers, model.layers[0]], "layers.0 is part of block 0 and of block 4"),
        (lambda model: [model.layers[0], model.layers[0].mlp], "layers.0.mlp is part of block 0 and of block 1"),
    ],
)
def test_blocks_that_are_none_are_refused(blocks: str | Callable[[Any], Any], message: str) -> None:
    model = TinyDecoder()
    with pytest.raises(ModelError, match=message):
        megascore.score_blockwise(model, blocks if isinstance(blocks, str) else blocks(model), make_batches())


def test_blocks_out_of_order_are_refused() -> None:
    model = TinyDecoder()
    with pytest.raises(ModelError, match="came to block 3 when block 0 was the next"):
        megascore.score_blockwise(model, list(model.layers)[::-1], make_batches())


@pytest.mark.parametrize("cache_block_outputs", [True, False])
@pytest.mark.parametrize("num_layers", [1, 3])
def test_blocks_that_run_several_times_in_a_pass_are_refused(cache_block_outputs: bool, num_layers: int) -> None:
    model = TinyDecoder(num_layers)
    model.num_rounds = 2
    with pytest.raises(ModelError, match="block 0 is reached twice in a forward pass"):
        megascore.score_blockwise(model, None, make_batches(), cache_block_outputs=cache_block_outputs)


def test_a_block_that_is_not_reached_is_told() -> None:
    model = TinyDecoder()
    model.spare = nn.ModuleList([*model.layers, nn.Linear(1, 1)])
    reached = pytest.raises(ModelError, match="batch 0 reached 4 of 5 blocks and ended without block 4")
    with pytest.warns(UserWarning, match=r"scores nothing in them.*: spare\.4: Linear\.$"), reached:
        megascore.score_blockwise(model, "spare", make_batches())


def test_no_batches_and_unknown_scores_are_refused() -> None:
    with pytest.raises(DataError, match="there are no batches"):
        megascore.score_blockwise(TinyDecoder(), None, [])
    with pytest.raises(DataError, match="batch 1 is a str without a tensor: expected"):
        megascore.score_blockwise(TinyDecoder(), None, [*make_batches(1), "text"])
    with pytest.raises(ConfigError, match="unknown recipe 'minitorn'. Did you mean 'minitron'"):
        megascore.score_blockwise(TinyDecoder(), None, make_batches(), "minitorn")
    with pytest.raises(ModelError, match="target 'experts' matches no module"):
        megascore.score_blockwise(TinyDecoder(), None, make_batches(), [{"target": "experts"}])


def test_one_tensor_in_place_of_batches_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"batches is a tensor \[2, 6\], expected one entry for each batch"):
        megascore.score_blockwise(TinyDecoder(), None, make_batches()[0])


def test_a_device_that_is_not_there_is_refused() -> None:
    with pytest.raises(ConfigError, match="device='xpu' cannot be used on this machine"):
        megascore.score_blockwise(TinyDecoder(), None, make_batches(), device="xpu")


def test_iterations_that_do_not_fit_the_batches_are_refused_before_anything_runs() -> None:
    model = TinyDecoder()
    for iterations in (2, 4):
        with pytest.raises(ConfigError, match=f"iterations={iterations}, and there are 3 batches.*a multiple of 3"):
            scores = [{"target": "ffn", "method": ITERATIVE, "iterations": iterations}]
            megascore.score_blockwise(model, None, make_batches(3), scores)
    assert model.layers[0].num_calls == 0


@pytest.mark.parametrize("cache_block_outputs", [True, False])
def test_a_full_spool_folder_ends_the_run_and_leaves_nothing(
    cache_block_outputs: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, written = TinyDecoder(), []

    def write(path: Path, content: bytes, **_: object) -> None:
        if len(written) == 12:
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(path)
        path.write_bytes(content)

    monkeypatch.setattr(stores, "write_whole", write)
    store = SpoolStore(tmp_path)
    with pytest.raises(DataError, match="No space left on device"):
        megascore.score_blockwise(model, None, make_batches(), cache_block_outputs=cache_block_outputs, store=store)
    assert len(written) == 12
    assert not list(tmp_path.rglob("*.safetensors"))
    assert not any(module._forward_hooks for module in model.modules())


def test_a_damaged_spool_folder_ends_the_run(tmp_path: Path) -> None:
    model = TinyDecoder()

    def damage(*_: object) -> None:
        for path in tmp_path.rglob("hidden-*.safetensors"):
            path.write_bytes(path.read_bytes()[:-1])

    model.layers[1].register_forward_hook(damage)
    with pytest.raises(DataError, match="spooled file .* is not as it was written"):
        megascore.score_blockwise(model, None, make_batches(), store=SpoolStore(tmp_path))


def test_blocks_that_change_the_shape_are_refused_when_cached() -> None:
    model = TinyDecoder()
    model.layers[1].returns = lambda x, _: x[:, ::2]
    with pytest.raises(ModelError, match=r"block 1 returned hidden states \[2, 3, 16\] for \[2, 6, 16\]: use cache"):
        megascore.score_blockwise(model, None, make_batches(), [{"target": "ffn"}])


def test_a_model_without_content_needs_a_folder(tmp_path: Path) -> None:
    model = TinyDecoder().to("meta")
    with pytest.raises(
        ModelError, match="without weights= there is no content for 50 tensors .*layers.0.input_layernorm.weight"
    ):
        megascore.score_blockwise(model, None, make_batches())
    with pytest.raises(ModelError, match="has no \\*.safetensors files"):
        megascore.score_blockwise(model, None, make_batches(), weights=tmp_path)
    with pytest.raises(ModelError, match="has no config.json"):
        megascore.score_blockwise(tmp_path, None, make_batches())


def test_a_folder_with_code_of_its_own_is_refused_without_asking(tmp_path: Path) -> None:
    own_code: dict[str, Any] = {"model_type": "own", "auto_map": {"AutoConfig": "configuration_own.OwnConfig"}}
    (tmp_path / "config.json").write_text(json.dumps(own_code))
    with pytest.raises(ModelError, match="code of its own .*not run: build it yourself"):
        megascore.score_blockwise(tmp_path, None, make_batches())
    # A config that transformers knows, and no language model that it has for it.
    own_code = {"model_type": "vit", "auto_map": {"AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}}
    (tmp_path / "config.json").write_text(json.dumps({**own_code, "architectures": ["OwnForCausalLM"]}))
    with pytest.raises(ModelError, match="code of its own .*not run: build it yourself"):
        megascore.score_blockwise(tmp_path, None, make_batches())


def test_a_folder_of_another_model_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    content = dict(TinyDecoder().state_dict())
    model = TinyDecoder().to("meta")
    save_file(
        {name: value for name, value in content.items() if "layers.1.mlp" not in name}, tmp_path / "a.safetensors"
    )
    with pytest.raises(ModelError, match="has no content for 4 tensors.*: layers.1.mlp.up_proj.weight, "):
        megascore.score_blockwise(model, None, make_batches(), weights=tmp_path)
    save_file({**content, "norm.weight": torch.ones(3)}, tmp_path / "a.safetensors")
    with pytest.raises(ModelError, match=r"norm.weight in .* has shape \[3\], the model expects \[16\]"):
        megascore.score_blockwise(model, None, make_batches(), weights=tmp_path)
    (tmp_path / "a.safetensors").write_bytes(b"no such thing")
    with pytest.raises(ModelError, match="a.safetensors cannot be read as a safetensors file"):
        megascore.score_blockwise(model, None, make_batches(), weights=tmp_path)

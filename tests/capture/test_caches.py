"""Caches of keys and values: none is made where inputs are caught, and those that are given are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megascore.capture import BlockCall, BlockInputCapture, HostStore, capture_block_inputs
from megascore.capture.caches import refuse_caches
from megascore.errors import ModelError
from tests.models import SIZES


@pytest.fixture
def model() -> nn.Module:
    """One of transformers, which makes a cache for each pass unless it is told not to."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    model: nn.Module = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SIZES)).eval()
    assert model.config.use_cache is True
    return model


def make_tokens() -> Tensor:
    return torch.arange(2 * 6).view(2, 6)


def test_a_block_runs_on_what_was_caught_as_often_as_one_likes(model: Any) -> None:
    tokens, layer = make_tokens(), model.model.layers[1]
    (call,) = capture_block_inputs(model, layer, [tokens])
    assert model.config.use_cache is True
    refuse_caches(call)
    with torch.no_grad():
        expected = model(tokens, output_hidden_states=True).hidden_states[2]
        for _ in range(2):
            output = layer(*call.args, **call.kwargs)
            assert torch.equal(output[0] if isinstance(output, tuple) else output, expected)


def test_the_settings_are_as_before_also_after_an_error(model: Any) -> None:
    with pytest.raises(IndexError):
        capture_block_inputs(model, "model.layers.0", [torch.tensor([[1000]])])
    assert model.config.use_cache is True


def test_who_drives_the_capture_himself_is_told_to_do_without(model: Any) -> None:
    store = HostStore()
    with BlockInputCapture(model.model.layers[1], store=store) as capture, torch.no_grad():
        with pytest.raises(ModelError, match="past_key_values is a DynamicCache.*call it with use_cache=False"):
            capture.run(model, make_tokens())
        assert (len(capture.inputs), store.num_bytes) == (0, 0)
        capture.run(model, make_tokens(), use_cache=False)
    assert len(capture.inputs) == 1


def test_a_cache_in_the_batches_is_refused(model: Any) -> None:
    from transformers import DynamicCache

    batch = {"input_ids": make_tokens(), "past_key_values": DynamicCache(), "use_cache": True}
    with pytest.raises(ModelError, match="past_key_values is a DynamicCache.*leave it out of the batches"):
        capture_block_inputs(model, "model.layers.0", [batch])


def test_a_cache_is_found_wherever_it_is() -> None:
    from transformers import DynamicCache

    hidden, cache = torch.ones(1), DynamicCache()
    refuse_caches(BlockCall((hidden, None, {"a": [hidden]}), {"table": (hidden, hidden), "use_cache": False}))
    for call, where in (
        (BlockCall((hidden, cache), {}), "argument 1 is a DynamicCache"),
        (BlockCall((hidden, None, [(cache,)]), {}), "argument 2 holds a DynamicCache"),
        (BlockCall((hidden,), {"extra": {"cache": cache}}), "extra holds a DynamicCache"),
    ):
        with pytest.raises(ModelError, match=where):
            refuse_caches(call)

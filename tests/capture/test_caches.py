"""Caches of keys and values: none is made where inputs are caught, and those that are given are refused."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megascore.capture import BlockCall, BlockInputCapture, HostStore, capture_block_inputs
from megascore.capture.caches import refuse_caches
from megascore.errors import ModelError
from tests.models import SIZES, cache_keyword


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
        with pytest.raises(ModelError, match=f"{cache_keyword(model)} is a DynamicCache.*call it with use_cache=False"):
            capture.run(model, make_tokens())
        assert (len(capture.inputs), store.num_bytes) == (0, 0)
        capture.run(model, make_tokens(), use_cache=False)
    assert len(capture.inputs) == 1


def test_a_cache_in_the_batches_is_refused(model: Any) -> None:
    from transformers import DynamicCache

    keyword = cache_keyword(model)
    batch = {"input_ids": make_tokens(), keyword: DynamicCache(), "use_cache": True}
    with pytest.raises(ModelError, match=f"{keyword} is a DynamicCache.*leave it out of the batches"):
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


class GrowingBlock(nn.Module):
    """Takes the cache under either name, as the blocks of transformers before and after 5.24 do."""

    def forward(self, hidden: Tensor, cache: Any = None, past_key_values: Any = None) -> Tensor:
        for one in (cache, past_key_values):
            if one is not None:
                one.update(hidden, hidden, 0)
        return hidden


class GrowingModel(nn.Module):
    """Hands its block a cache that it was given, or made itself, under the name that it is built with."""

    def __init__(self, keyword: str) -> None:
        super().__init__()
        self.keyword, self.block = keyword, GrowingBlock()

    def forward(self, hidden: Tensor, make: Callable[[], Any] | None = None, **given: Any) -> Tensor:
        output: Tensor = self.block(hidden, **({self.keyword: make()} if make else given))
        return output


@pytest.mark.parametrize("keyword", ["cache", "past_key_values"])
def test_a_cache_is_known_under_the_old_name_and_the_new(keyword: str) -> None:
    from transformers import DynamicCache

    model, hidden = GrowingModel(keyword), torch.ones(1, 2, 4, 8)
    for batch in ({"hidden": hidden, keyword: DynamicCache()}, {"hidden": hidden, "make": DynamicCache}):
        with pytest.raises(ModelError, match=f"{keyword} is a DynamicCache"):
            capture_block_inputs(model, "block", [batch])
    # The name alone is nothing.
    [call] = capture_block_inputs(model, "block", [{"hidden": hidden, keyword: None}])
    assert call.kwargs == {keyword: None}


class KeysAndValues:
    def update(self, keys: Tensor, values: Tensor, layer: int) -> None: ...

    def get_seq_length(self) -> int: ...  # type: ignore[empty-body]


class MambaStates:
    def update_conv_state(self, layer: int, state: Tensor) -> None: ...


class SsmStates:
    def update_ssm_state(self, layer: int, state: Tensor) -> None: ...


class RecurrentStates:
    def update_recurrent_state(self, state: Tensor, layer: int) -> None: ...


class XlstmStates:
    def __init__(self) -> None:
        self.rnn_state: dict[int, Tensor] = {}
        self.seqlen_offset = 0


class InferenceContext:
    def is_static_batching(self) -> bool: ...  # type: ignore[empty-body]


@pytest.mark.parametrize(
    "kind", [KeysAndValues, MambaStates, SsmStates, RecurrentStates, XlstmStates, InferenceContext]
)
def test_caches_of_every_kind_are_known_by_what_they_are(kind: type) -> None:
    for value in (kind(), [kind()], {"layer": kind()}):
        with pytest.raises(ModelError, match=kind.__name__):
            refuse_caches(BlockCall((torch.ones(1),), {"anything": value}))


class AnswersAnything:
    def __getattr__(self, name: str) -> Any:
        return None


def test_what_is_not_written_into_is_no_cache() -> None:
    hidden = torch.ones(1, 2, 4, 8)
    for value in (hidden, (hidden, hidden), {"update": hidden}, {1, 2}, AnswersAnything(), nn.ModuleDict(), "cache"):
        refuse_caches(BlockCall((hidden,), {"past_key_values": value, "cache": value}))


def caches_of_transformers() -> list[type]:
    """Return the classes of caches that the installed version has, in three places where versions have them."""
    found = []
    for name in ("cache_utils", "models.mamba2.modeling_mamba2", "models.jamba.modeling_jamba"):
        module = import_module(f"transformers.{name}")
        found += [kind for kind in vars(module).values() if isinstance(kind, type) and kind.__name__.endswith("Cache")]
    return found


def test_every_cache_of_the_installed_transformers_is_known() -> None:
    kinds = caches_of_transformers()
    assert {"DynamicCache", "StaticCache", "EncoderDecoderCache"} <= {kind.__name__ for kind in kinds}
    for kind in kinds:
        # Making one takes other settings in each version; its methods are there without.
        with pytest.raises(ModelError, match=f"anything is a {kind.__name__}"):
            refuse_caches(BlockCall((torch.ones(1),), {"anything": object.__new__(kind)}))


def test_the_inference_contexts_of_megatron_are_known() -> None:
    pytest.importorskip("megatron.core")
    import_module("megascore.mcore")  # imports Megatron quietly
    from megatron.core.inference.contexts import DynamicInferenceContext, StaticInferenceContext

    for context in (StaticInferenceContext(1, 8), object.__new__(DynamicInferenceContext)):
        with pytest.raises(ModelError, match=f"inference_context is a {type(context).__name__}"):
            refuse_caches(BlockCall((torch.ones(1),), {"inference_context": context}))

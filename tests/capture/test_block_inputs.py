"""Captured inputs of a block: all arguments, its own halt only, and nothing left behind."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megascore.capture import BlockInputCapture, DeviceStore, HostStore, SpoolStore, capture_block_inputs
from megascore.capture import calls as calls_module
from megascore.errors import ConfigError, ModelError


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.num_calls = 0

    def forward(self, hidden_states: Tensor, mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        self.num_calls += 1
        out = hidden_states + self.linear(hidden_states)
        return out if mask is None else out * mask


class Model(nn.Module):
    """Three blocks; how they are called can be chosen."""

    def __init__(self, by_keyword: bool = False) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.by_keyword = by_keyword
        self.num_times = 1
        self.error: BaseException | None = None
        self.swallows = False

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        if self.error is not None:
            raise self.error
        x = x * scale
        mask = torch.ones(x.shape[1], 1)
        for number, block in enumerate(self.blocks):
            for _ in range(self.num_times):
                tables = {"cos": (mask, mask), "layer": number}
                if self.by_keyword:
                    x = block(hidden_states=x, mask=mask, tables=tables)
                else:
                    x = self.call(block, x, mask, tables)
        return x

    def call(self, block: nn.Module, *args: Any) -> Tensor:
        x, mask, tables = args
        if not self.swallows:
            result: Tensor = block(x, mask, tables=tables)
            return result
        try:
            return block(x, mask, tables=tables)  # type: ignore[no-any-return]
        except Exception:
            return x


@pytest.fixture
def model() -> Iterator[Model]:
    torch.manual_seed(0)
    model = Model()
    yield model
    assert not any(module._forward_pre_hooks for module in model.modules())


def batches(number: int = 3) -> list[Tensor]:
    return [torch.randn(2, 3 + n, 4, generator=torch.Generator().manual_seed(n)) for n in range(number)]


@pytest.mark.parametrize("by_keyword", [False, True])
@pytest.mark.parametrize("name", ["device", "host", "spool"])
def test_a_block_runs_on_its_captured_inputs_as_in_the_model(by_keyword: bool, name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Model(by_keyword)
    store = {"device": DeviceStore, "host": HostStore, "spool": lambda: SpoolStore(tmp_path, 100)}[name]()
    calls = capture_block_inputs(model, "blocks.1", batches(), store=store)
    assert len(calls) == 3
    assert [block.num_calls for block in model.blocks] == [3, 0, 0]
    for call, batch in zip(calls, batches(), strict=True):
        assert call.kwargs["tables"]["layer"] == 1
        assert call.kwargs["tables"]["cos"][0] is call.kwargs["tables"]["cos"][1]
        torch.testing.assert_close(call.hidden_states, model.blocks[0](batch), rtol=0, atol=0)
        output = model.blocks[2](model.blocks[1](*call.args, **call.kwargs))
        torch.testing.assert_close(output, model(batch), rtol=0, atol=0)


def test_batches_can_be_mappings_and_sequences(model: Model) -> None:
    x = batches(1)[0]
    calls = capture_block_inputs(model, model.blocks[0], [x, (x, 2.0), {"x": x, "scale": 3.0}])
    for call, scale in zip(calls, (1, 2, 3), strict=True):
        assert torch.equal(call.hidden_states, x * scale)


def test_equal_arguments_are_stored_once(model: Model) -> None:
    store = HostStore()
    same = [torch.randn(2, 5, 4) for _ in range(10)]
    capture_block_inputs(model, "blocks.0", same, store=store)
    mask_bytes = 5 * 4
    assert store.num_bytes == 10 * same[0].nbytes + mask_bytes


def test_errors_of_the_model_come_through_and_leave_nothing(model: Model) -> None:
    capture = BlockInputCapture(model.blocks[1])
    for error in (ValueError("my own"), KeyboardInterrupt()):
        with pytest.raises(type(error)), capture:
            model.error = None
            capture.run(model, batches(1)[0])
            model.error = error
            capture.run(model, batches(1)[0])
    assert len(capture.inputs) == 2  # one of each time, before the error
    assert not model.blocks[1]._forward_pre_hooks


def test_an_error_behind_a_block_that_does_not_halt_leaves_nothing(model: Model) -> None:
    model.blocks[2].forward = lambda *_, **__: 1 / 0  # type: ignore[assignment]
    store = HostStore()
    capture = BlockInputCapture(model.blocks[1], halt=False, store=store)
    with capture, pytest.raises(ZeroDivisionError):
        capture.run(model, batches(1)[0])
    assert len(capture.inputs) == 0
    assert store.num_bytes == 0


def test_a_model_that_catches_exceptions_does_not_catch_the_halt(model: Model) -> None:
    model.swallows = True
    calls = capture_block_inputs(model, "blocks.2", batches(2))
    assert len(calls) == 2
    assert model.blocks[2].num_calls == 0


def test_a_model_that_catches_everything_is_told(model: Model) -> None:
    def forward(x: Tensor) -> Tensor:
        try:
            return Model.forward(model, x)
        except BaseException:
            return x

    with BlockInputCapture(model.blocks[1]) as capture, pytest.raises(ModelError, match="went on after it was halted"):
        capture.run(forward, batches(1)[0])
    assert len(capture.inputs) == 0


def test_nested_captures_catch_their_own_halt_only(model: Model) -> None:
    outer, inner = BlockInputCapture(model.blocks[0]), BlockInputCapture(model.blocks[1])
    x = batches(1)[0]
    with outer, inner:
        # The outer one's block comes first, inside of a pass of the inner one.
        outer.run(inner.run, model, x)
    assert (len(outer.inputs), len(inner.inputs)) == (1, 0)
    other = Model()
    with BlockInputCapture(other.blocks[0]) as first, BlockInputCapture(model.blocks[1]) as second:

        def both() -> None:
            second.run(model, x)
            first.run(other, x)
            raise AssertionError("after both")

        with pytest.raises(AssertionError, match="after both"):
            both()
    assert (len(first.inputs), len(second.inputs)) == (1, 1)


@pytest.mark.parametrize("halt", [True, False])
def test_a_block_that_is_never_reached_is_told(model: Model, halt: bool) -> None:
    with (
        BlockInputCapture(Block(), halt=halt) as capture,
        pytest.raises(ModelError, match="without reaching the block"),
    ):
        capture.run(model, batches(1)[0])
    assert len(capture.inputs) == 0


def test_a_block_that_is_reached_twice_is_told_where_the_pass_goes_on(model: Model) -> None:
    model.num_times = 2
    with BlockInputCapture(model.blocks[1], halt=False) as capture:
        with pytest.raises(ModelError, match="was reached 2 times in one forward pass"):
            capture.run(model, batches(1)[0])
        assert len(capture.inputs) == 0
        model.num_times = 1
        capture.run(model, batches(1)[0])
    # A pass that is halted ends at the first call, and does not see whether there would be another.
    model.num_times = 2
    assert len(capture_block_inputs(model, "blocks.1", batches(1))) == 1
    assert len(capture.inputs) == 1


def test_without_halting_the_pass_goes_on_and_gives_the_same(model: Model) -> None:
    x, outputs = batches(1)[0], []
    with BlockInputCapture(model.blocks[1], halt=False) as capture:
        capture.run(lambda: outputs.append(model(x)))
    assert torch.equal(outputs[0], model(x))
    assert torch.equal(capture.inputs[0].hidden_states, capture_block_inputs(model, "blocks.1", [x])[0].hidden_states)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_modes_are_as_before_and_tensors_are_normal(model: Model, mode: Any) -> None:
    with mode(), BlockInputCapture(model.blocks[1]) as capture:
        before = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        capture.run(model, batches(1)[0])
        assert (torch.is_grad_enabled(), torch.is_inference_mode_enabled()) == before
    call = capture.inputs[0]
    assert not call.hidden_states.is_inference()
    assert not call.hidden_states.requires_grad
    # A normal tensor can be part of a graph.
    call.hidden_states.requires_grad_()
    model.blocks[1](*call.args, **call.kwargs).sum().backward()


def test_a_compiled_model_runs_uncompiled(model: Model) -> None:
    compiled = torch.compile(model, backend="eager")
    x = batches(1)[0]
    expected = compiled(x)  # compiled before the hook is there
    capture = BlockInputCapture(model.blocks[1])
    with capture:
        capture.run(compiled, x)
    assert torch.equal(capture.inputs[0].hidden_states, model.blocks[0](x))
    assert torch.equal(compiled(x), expected)


def test_a_block_that_works_in_place_does_not_spoil_what_is_stored(model: Model) -> None:
    calls = capture_block_inputs(model, "blocks.0", batches(1))
    calls[0].hidden_states.zero_()
    assert torch.equal(calls[0].hidden_states, batches(1)[0])


def test_running_without_the_hook_is_refused(model: Model) -> None:
    with pytest.raises(ModelError, match="inside of 'with capture:'"):
        BlockInputCapture(model.blocks[0]).run(model, batches(1)[0])


def test_entering_again_is_refused_and_leaves_no_hook(model: Model) -> None:
    capture = BlockInputCapture(model.blocks[0])
    with capture:
        with pytest.raises(ModelError, match="has its hook on already"), capture:
            pass
        # The one that is there still works.
        capture.run(model, batches(1)[0])
    assert len(capture.inputs) == 1
    assert not model.blocks[0]._forward_pre_hooks


def test_one_tensor_is_no_sequence_of_batches(model: Model) -> None:
    with pytest.raises(ConfigError, match=r"batches is a tensor \[2, 3, 4\].*give \[tokens\].*tokens.split"):
        capture_block_inputs(model, "blocks.0", batches(1)[0])


def test_what_calls_share_is_read_from_the_spool_folder_once(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, read = SpoolStore(tmp_path), []
    get = store.get

    def counted(key: str, *args: Any, **kwargs: Any) -> Tensor:
        read.append(key)
        return get(key, *args, **kwargs)

    monkeypatch.setattr(store, "get", counted)
    calls = capture_block_inputs(model, "blocks.0", [batches(1)[0]] * 3, store=store)
    with torch.inference_mode():
        first = calls[0]
    masks = [first.args[1], *(call.args[1] for call in calls)]
    assert len({id(mask) for mask in masks}) == 1
    assert not masks[0].is_inference()
    assert sum(key.startswith("argument-") for key in read) == 1
    assert sum(key.startswith("hidden-") for key in read) == 4
    calls.truncate(0)
    assert not list(tmp_path.rglob("*.safetensors"))
    assert not calls._ready


def test_large_arguments_do_not_stay_on_the_device(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls_module, "READY_BYTES", 3 * 4 + 4 * 4)
    # Masks of 3, 4 and 5 numbers: the first two fit.
    calls = capture_block_inputs(model, "blocks.0", batches(3))
    for _ in range(2):
        assert [call.args[1].shape[0] for call in calls] == [3, 4, 5]
    assert sorted(len(tensor) for tensor in calls._ready.values()) == [3, 4]


def test_no_such_block_is_told(model: Model) -> None:
    with pytest.raises(ModelError, match="Model has no block 'layers.0'.*its lists of modules: blocks"):
        capture_block_inputs(model, "layers.0", batches(1))
    with pytest.raises(ModelError, match="not part of the model"):
        capture_block_inputs(model, Block(), batches(1))


def test_a_block_without_hidden_states_is_told() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = nn.Identity()

        def forward(self, x: Tensor) -> Any:
            return self.block([x])

    with pytest.raises(ModelError, match=r"was called with \(list\): its hidden states must be a tensor"):
        capture_block_inputs(Odd(), "block", batches(1))


@pytest.mark.parametrize("device", ["cuad", "cuda:x", "xpu", 1.5])
def test_a_device_that_is_not_there_is_told_before_the_model_runs(model: Model, device: Any) -> None:
    model.error = AssertionError("ran")
    message = f"device='{device}' cannot be used on this machine: .*Give 'cpu'"
    with pytest.raises(ConfigError, match=message):
        BlockInputCapture(model.blocks[0], device=device)
    with pytest.raises(ConfigError, match=message):
        capture_block_inputs(model, model.blocks[0], [torch.ones(1, 2, 4)], device=device)

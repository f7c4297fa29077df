"""Inputs of a layer, captured on every layout: on them the layer gives what it gave in the model."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megascore.config import ModelConfig, ParallelConfig
from tests.models import save_checkpoint
from tests.pool import WorkerPool

LAYER, LENGTH = 2, 16
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one process": (1, {}),
    "TP=2 with sequence parallel": (2, {"tensor": 2, "sequence": True}),
    "PP=2": (2, {"pipeline": 2}),
    "PP=2 x VPP=2": (2, {"pipeline": 2, "virtual_pipeline": 2}),
    "CP=2": (2, {"context": 2}),
}
Captured = tuple[list[tuple[Tensor, Tensor]], list[int], list[int]]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("model") / "llama", "llama")


def micro_batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, 128, (size, LENGTH), generator=generator) for size in (1, 2, 1)]


def capture_on_rank(checkpoint: Path, degrees: dict[str, Any]) -> Captured:
    """Return input and output of the layer for each micro-batch, which layers ran meanwhile, and its own."""
    from megascore.mcore import capture_layer_inputs
    from megascore.mcore.models.build import load_model
    from megascore.mcore.pipeline.schedule import forward_only
    from megascore.mcore.world.parallel_world import parallel_world

    parallel, device = ParallelConfig(**degrees), torch.device("cpu")
    with parallel_world(parallel, device, timedelta(seconds=60)):
        chunks = load_model(ModelConfig(hf=str(checkpoint), dtype="float64"), parallel, device, LENGTH)
        layers = {layer.layer_number - 1: layer for chunk in chunks for layer in chunk.decoder.layers}
        ran: list[int] = []
        for number, layer in layers.items():
            layer.register_forward_hook(lambda *_, number=number: ran.append(number))
        calls = capture_layer_inputs(chunks, LAYER, micro_batches())
        ran_in_capture = list(ran)
        pairs: list[tuple[Tensor, Tensor]] = []
        if LAYER in layers:
            real: list[Tensor] = []
            handle = layers[LAYER].register_forward_hook(lambda _module, _args, output: real.append(output[0]))
            forward_only(chunks, micro_batches(), compute_loss=False)
            handle.remove()
            with torch.no_grad():
                alone = [layers[LAYER](*call.args, **call.kwargs)[0] for call in calls]
            assert len(alone) == len(real) == len(micro_batches())
            for output, expected in zip(alone, real, strict=True):
                assert torch.equal(output, expected)
            pairs = [(call.hidden_states, output) for call, output in zip(calls, alone, strict=True)]
        else:
            assert len(calls) == 0
            forward_only(chunks, micro_batches(), compute_loss=False)
        return pairs, ran_in_capture, sorted(layers)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_captured_inputs_replay_the_layer_on(layout: str, checkpoint: Path, world: WorkerPool) -> None:
    world_size, degrees = LAYOUTS[layout]
    ranks = world.run(world_size, capture_on_rank, checkpoint, degrees)
    whole = world.run(1, capture_on_rank, checkpoint, {})[0][0] if world_size > 1 else ranks[0][0]
    pipelined = "PP" in layout
    for _, ran, own_layers in ranks:
        # Halted passes never run the layer itself; where stages wait for each other, all of them run to the end.
        assert sorted(set(ran)) == (own_layers if pipelined else [0, 1])
        assert len(ran) == len(set(ran)) * len(micro_batches())
    assert sum(bool(pairs) for pairs, *_ in ranks) == (1 if pipelined else world_size)
    for number, (hidden, _) in enumerate(whole):
        parts = [pairs[number][0] for pairs, *_ in ranks if pairs]
        if layout == "CP=2":
            # Two chunks of each rank, one from each end.
            halves = [part.chunk(2) for part in parts]
            parts = [halves[0][0], halves[1][0], halves[1][1], halves[0][1]]
        # float64: tensor-parallel sums are added up in another order.
        torch.testing.assert_close(torch.cat(parts), hidden, rtol=1e-12, atol=1e-12)


def ask_for_what_is_not_there(checkpoint: Path) -> list[str]:
    from megascore.errors import MegascoreError
    from megascore.mcore import capture_layer_inputs
    from megascore.mcore.models.build import load_model
    from megascore.mcore.world.parallel_world import parallel_world

    parallel, device = ParallelConfig(pipeline=2), torch.device("cpu")
    with parallel_world(parallel, device, timedelta(seconds=60)):
        chunks = load_model(ModelConfig(hf=str(checkpoint), dtype="float64"), parallel, device, LENGTH)
        with pytest.raises(MegascoreError) as no_layer:
            capture_layer_inputs(chunks, 9, micro_batches())
        with pytest.raises(MegascoreError) as no_device:
            capture_layer_inputs(chunks, LAYER, micro_batches(), device="cuad")
    return [str(no_layer.value), str(no_device.value)]


def test_a_layer_or_device_that_is_not_there_is_refused_on_all_ranks(checkpoint: Path, world: WorkerPool) -> None:
    """Also on ranks that do not have the layer, which would wait for the one that does."""
    for no_layer, no_device in world.run(2, ask_for_what_is_not_there, checkpoint):
        assert no_layer == "the model has no layer 9: its layers are 0 to 3."
        assert "device='cuad' cannot be used on this machine" in no_device
